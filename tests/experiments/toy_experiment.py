"""A tiny experiment with a measure whose numbers are known, run through the real command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax

from experiments import run
from lm.config import ModelConfig
from lm.files import without_sum
from lm.measures import Measure, Measured, Progress, Subject

CONFIG = '''
"""Hypothesis: the toy's numbers are its settings. Cost: nothing."""

from ml_collections import ConfigDict

from experiments.claims import claim

SCALES = ("smoke", "laptop")


def get_config(scale="laptop"):
    c = ConfigDict(convert_dict=False)
    c.name = "toy"
    c.scale = scale
    c.paper = {"title": "A Toy", "arxiv": "0000.00000", "claim": "two is more than one", "numbers": {"two": 2.0}}
    c.checkpoint = "random"
    c.model = {"vocab_size": 258, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8, "max_positions": 32}
    c.seeds = (0, 1)
    c.baseline = "zero"
    c.measures = {"toy": {"name": "toy", "value": 1.0}, "other": {"name": "toy", "value": 5.0, "n": 1}}
    c.arms = {
        "zero": {},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": 4, "measures.toy.value": 2.0},
        "also": {"model.pattern": "lm_infinite", "only": ("toy",)},
    }
    return c


def claims(r):
    return [
        claim("two is more than one", lambda: (r.mean("window", "toy/value") > r.mean("zero", "toy/value"),
              {"window": r.mean("window", "toy/value")}), paper="2"),
        claim("one is more than two", lambda: (r.mean("zero", "toy/value") > 1.9,
              {"zero": r.mean("zero", "toy/value")})),
        claim("unknowable", lambda: (r.mean("zero", "toy/colour") > 0, {})),
    ]
'''


@dataclass(frozen=True)
class Toy(Measure):
    """Samples ``value + seed + 0, 1, …``; remembers its calls; `after` calls ends in `error`."""

    value: float = field(default=1.0, metadata={"finite": False})
    n: int = 2
    tags: tuple[str, ...] = ()
    calls: ClassVar[list[tuple[str, float, int]]] = []
    after: ClassVar[int | None] = None
    error: ClassVar[BaseException] = KeyboardInterrupt()

    def cost(self, cfg: ModelConfig) -> float:
        return 3.0

    def identity(self) -> str:
        return "toy text"

    def run(self, subject: Subject, progress: Progress) -> Measured:
        if Toy.after is not None and len(Toy.calls) >= Toy.after:
            raise Toy.error
        Toy.calls.append((type(subject.config.pattern).__name__, self.value, subject.seed))
        progress(0.5, "half")
        embed = float(jax.numpy.abs(subject.params["embed"]).sum())
        up = float(jax.numpy.abs(subject.params["blocks"]["ffn"]["up"]["kernel"]).sum())
        samples = {"value": [self.value + subject.seed + i for i in range(self.n)], "embed": [embed], "up": [up]}
        curve = {"x": [1.0, 2.0], "y": [self.value, self.value + subject.seed], "y_by_sample": [[0.0, 1.0]]}
        return Measured(samples, {"line": curve}, {"documents": [{"name": "none", "licence": "none"}]})


@dataclass(frozen=True)
class Fixed(Toy):
    """A toy that draws nothing."""

    stochastic: ClassVar[bool] = False


@dataclass
class Lab:
    """``lab("--arms=…")`` runs the toy config; `folder` is the run folder."""

    root: Path
    config: Path
    folder: Path
    calls: list[tuple[str, float, int]] = field(default_factory=list)

    def __call__(self, *args: str, config: str | None = None, workdir: Path | None = None) -> int:
        Toy.calls.clear()
        where = f"--workdir={workdir or self.folder}"
        own = [f"--file={self.config}"] if (config or "").endswith("/config.json") else []  # it is not in the checkout
        return run.main([f"--config={config or self.config}", where, *own, *args])

    def results(self, folder: Path | None = None) -> dict[str, Any]:
        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        text = ((folder or self.folder) / "results.json").read_text()
        made = without_sum(json.loads(text, parse_constant=refuse))
        assert made is not None
        return made
