"""What a router's choices depend on, where it drops tokens, and when its choices were made (arXiv 2402.01739, section
5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.data import texts
from lm.errors import UserError
from lm.interop import reader
from lm.interop.readers.run_folder import Run
from lm.measures.base import Measure, Measured, Progress, Subject, encode
from lm.model.inputs import Inputs
from lm.watch import Watch

_NO_CHOICE = "measures.routing: in no layer do tokens choose experts; valid: model.ffn = moe"
_NOT_HERE = "measures.routing_history: the parameters were not trained here; valid: set train"


def _rows(subject: Subject, specs: tuple[str, ...], length: int, rows: int, key: str) -> np.ndarray:
    """Token ids ``[texts, rows, length]``, from the start of each text."""
    out = []
    for spec in specs:
        ids = encode(subject, "\n\n".join(d.text for d in texts.documents(spec)), key)
        if len(ids) < rows * length:
            raise UserError(
                f"{key}.rows: {rows} rows of {length} tokens asked for, {spec!r} has {len(ids)} tokens; valid: fewer"
            )
        out.append(np.asarray(ids[: rows * length], np.int32).reshape(rows, length))
    return np.stack(out)


def _reader(subject: Subject) -> Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """``(params, ids[R, T]) -> experts, kept``, both ``[M, R, T, k]`` over the M layers whose tokens choose experts."""
    model = subject.model

    @jax.jit
    def run(params: Any, ids_BT: jax.Array) -> Any:
        out = model.apply(params, Inputs(ids_BT), watch=Watch(taps=("ffn/experts", "ffn/kept"), logits=False))
        return out.tap("ffn/experts"), out.tap("ffn/kept")

    def read(params: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = next(n for n in range(min(16, len(ids)), 0, -1) if len(ids) % n == 0)
        parts = [jax.device_get(run(params, jnp.asarray(ids[i : i + size]))) for i in range(0, len(ids), size)]
        if not parts[0][0]:
            raise UserError(_NO_CHOICE)
        joined = [np.concatenate([np.stack(p[n]) for p in parts], axis=1) for n in (0, 1)]
        return joined[0], joined[1]

    return read


def information(c_fit: np.ndarray, e_fit: np.ndarray, c: np.ndarray, e: np.ndarray, E: int) -> tuple[float, float]:
    """What knowing c tells about expert e on tokens that the table was not made from: nats, and accuracy.

    The table is the share of experts by c among `c_fit`, `e_fit`, drawn towards the overall share by one token's
    weight; nats are the fall in cross-entropy against the overall share alone, so that noise in a large table costs
    rather than gains, as it would in a plug-in estimate of mutual information.
    """
    overall = np.bincount(e_fit, minlength=E) + 1e-3
    overall = overall / overall.sum()
    table = np.zeros((int(max(c_fit.max(), c.max())) + 1, E))
    np.add.at(table, (c_fit, e_fit), 1.0)
    share = (table + overall) / (table.sum(1, keepdims=True) + 1.0)
    gain = np.log(share[c, e]) - np.log(overall[e])
    return float(gain.mean()), float((share[c].argmax(1) == e).mean())


@dataclass(frozen=True)
class Routing(Measure):
    """Reads `rows` rows of `length` tokens of every text; the odd rows are predicted from the even ones.

    Samples, means over the mixture layers: ``info_X`` (nats about a token's first expert) and ``accuracy_X`` for X =
    ``id`` (the token), ``previous`` (the token before), ``position``, ``text`` (which of the texts; with more than
    one); ``accuracy_none`` (the commonest expert); ``load_max``, the largest expert's share of first choices;
    ``dropped``, ``dropped_early`` and ``dropped_late`` (first and last quarter of the row), and ``dropped@TEXT``:
    shares of choices, under the arm's ``eval_capacity``. Curves: dropped by position, and by expert of the last mixture
    layer the spread of its share over ids (``spread_id``) and over positions (``spread_position``).
    """

    texts: tuple[str, ...] = ("kjv:Genesis", "python-docs")
    length: int = 128
    rows: int = 64
    bin: int = 8
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.length < 8 or self.rows < 2 or not 1 <= self.bin <= self.length:
            raise UserError(
                f"measures.routing: length must be at least 8, rows at least 2 and bin from 1 to length, found "
                f"{self.length}, {self.rows}, {self.bin}"
            )

    def identity(self) -> str:
        return texts.identity([d for spec in self.texts for d in texts.documents(spec)])

    def cost(self, cfg: ModelConfig) -> float:
        return float(len(self.texts) * self.rows * self.length)

    def check(self, subject: Subject, trains: bool) -> None:
        if not any(layer.ffn.choices for layer in subject.config.layers()):
            raise UserError(_NO_CHOICE)
        _rows(subject, self.texts, self.length, self.rows, "measures.routing")

    def run(self, subject: Subject, progress: Progress) -> Measured:
        ids = _rows(subject, self.texts, self.length, self.rows, "measures.routing")
        n, R, T = ids.shape
        experts, kept = _reader(subject)(subject.params, ids.reshape(n * R, T))
        progress(0.8, "read")
        E = max(layer.ffn.n_experts for layer in subject.model.layers())
        flat = ids.reshape(n * R, T)
        of = {
            "id": flat,
            "previous": np.concatenate([np.zeros((n * R, 1), np.int32), flat[:, :-1] + 1], axis=1),
            "position": np.broadcast_to(np.arange(T), flat.shape),
            "none": np.zeros_like(flat),
        }
        if n > 1:
            of["text"] = np.repeat(np.arange(n), R)[:, None] + np.zeros_like(flat)
        fit, test = np.arange(n * R) % 2 == 0, np.arange(n * R) % 2 == 1
        found: dict[str, list[float]] = {}
        for layer in experts[..., 0]:
            for name, c in of.items():
                nats, accuracy = information(
                    c[fit].ravel(), layer[fit].ravel(), c[test].ravel(), layer[test].ravel(), E
                )
                found.setdefault(f"info_{name}", []).append(nats)
                found.setdefault(f"accuracy_{name}", []).append(accuracy)
            found.setdefault("load_max", []).append(np.bincount(layer.ravel(), minlength=E).max() / layer.size)
        del found["info_none"]
        lost = 1.0 - kept.mean(axis=(0, 1, 3))  # by position
        quarter = T // 4
        samples = {k: [float(np.mean(v))] for k, v in found.items()}
        samples |= {
            "dropped": [float(lost.mean())],
            "dropped_early": [float(lost[:quarter].mean())],
            "dropped_late": [float(lost[-quarter:].mean())],
        }
        by_text = 1.0 - kept.reshape(len(kept), n, -1).mean(axis=(0, 2))
        for spec, share in zip(self.texts, by_text, strict=True):
            samples[f"dropped@{spec.split(':')[0]}"] = [float(share)]
        edges = range(0, T, self.bin)
        curves = {
            "dropped": {
                "x": [float(a + min(self.bin, T - a) / 2) for a in edges],
                "y": [float(lost[a : a + self.bin].mean()) for a in edges],
                "xlabel": "position, tokens",
                "ylabel": "share of choices dropped",
            },
            **{f"spread_{c}": self._spread(experts[-1, ..., 0], of[c], E, c) for c in ("id", "position")},
        }
        return Measured(samples, curves, {"texts": list(self.texts), "layers": len(experts)})

    def _spread(self, chosen: np.ndarray, c: np.ndarray, E: int, name: str) -> dict[str, Any]:
        """Standard deviation of each expert's share over values of `c` seen 8 times or more, the largest first."""
        table = np.zeros((int(c.max()) + 1, E))
        np.add.at(table, (c.ravel(), chosen.ravel()), 1.0)
        table = table[table.sum(1) >= 8]
        share = table / table.sum(1, keepdims=True)
        return {
            "x": list(range(E)),
            "y": np.sort(share.std(0))[::-1].tolist() if len(table) else [0.0] * E,
            "xlabel": "expert of the last mixture layer, sorted",
            "ylabel": f"standard deviation of its share over {name}s",
        }


@dataclass(frozen=True)
class RoutingHistory(Measure):
    """The choices of every kept checkpoint (``train.keep_every``) against the last one's, on the same text.

    Samples: ``overlap_early``, the share of a token's experts that it keeps to the end, at the first checkpoint after
    `early` of the steps; ``overlap_chance``, what choices independent of the token but with the same loads would share;
    ``overlap_first``, at the first checkpoint. Curve: overlap by step.
    """

    texts: tuple[str, ...] = ("kjv:Genesis",)
    length: int = 128
    rows: int = 32
    early: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.early < 1 or self.length < 8 or self.rows < 1:
            raise UserError(
                f"measures.routing_history: early must lie in (0, 1), length be at least 8 and rows at least 1, found "
                f"{self.early}, {self.length}, {self.rows}"
            )

    def identity(self) -> str:
        return texts.identity([d for spec in self.texts for d in texts.documents(spec)])

    def cost(self, cfg: ModelConfig) -> float:
        return 10.0 * len(self.texts) * self.rows * self.length

    def check(self, subject: Subject, trains: bool) -> None:
        if not trains:
            raise UserError(_NOT_HERE)
        _rows(subject, self.texts, self.length, self.rows, "measures.routing_history")

    def run(self, subject: Subject, progress: Progress) -> Measured:
        if subject.run is None:
            raise UserError(_NOT_HERE)
        run = Run(subject.run, reader)
        steps = run.steps()
        if len(steps) < 3:
            raise UserError(
                f"measures.routing_history: {subject.run} keeps checkpoints {steps}; valid: set train.keep_every to a "
                "fraction of train.steps"
            )
        ids = _rows(subject, self.texts, self.length, self.rows, "measures.routing_history")
        flat = ids.reshape(-1, self.length)
        read = _reader(subject)
        last = read(run.params(subject.config, step=steps[-1]), flat)[0]
        E = int(last.max()) + 1
        overlaps, chances = [], []
        for n, step in enumerate(steps[:-1]):
            then = read(run.params(subject.config, step=step), flat)[0]
            same = (then[..., :, None] == last[..., None, :]).any(-1)
            overlaps.append(float(same.mean()))
            loads = [
                [np.bincount(layer.ravel(), minlength=max(E, int(then.max()) + 1)) / layer[..., 0].size for layer in x]
                for x in (then, last)
            ]
            chances.append(float(np.mean([(a * b).sum() / last.shape[-1] for a, b in zip(*loads, strict=True)])))
            progress((n + 1) / len(steps), f"step {step}")
        at = next((n for n, s in enumerate(steps[:-1]) if s >= self.early * steps[-1]), len(steps) - 2)
        samples = {
            "overlap_early": [overlaps[at]],
            "overlap_chance": [chances[at]],
            "overlap_first": [overlaps[0]],
        }
        curve = {
            "x": list(steps[:-1]),
            "y": overlaps,
            "xlabel": "step",
            "ylabel": "share of experts kept to the end",
        }
        return Measured(samples, {"overlap": curve}, {"steps": list(steps), "early step": steps[at]})
