"""One model on 1 to 4,096 chips, from programs that the TPU's compiler makes: memory, traffic, and what bounds a step.

``python -m benchmarks.scaling [--out=benchmarks/results/scaling-aot.json] [--only=NAME …] [--png=FILE]``

Llama 2 7B, trained in full on slices of v5p. ``weak``: four rows of 4,096 tokens a chip. ``strong``: 1,024 rows on any
number of chips. ``layout``: other axes on the largest slice. ``dcn``: two slices. Points that the file has are
not made again, so that an interrupted run goes on; ``--only`` names points, ``--png`` draws those that are there.
Nothing runs on a TPU: seconds are lower bounds of each resource alone. Needs the extra ``aot``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.certificates import command as step
from experiments.certificates import text as certified_text
from lm.aot import certificate, chips
from lm.aot.estimate import estimate
from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.files import write_json
from lm.model import params
from lm.train import flops
from lm.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "scaling-aot.json"
BASE, SCHEMA = "llama2_7b", 1
ROWS = 4  # of a chip in one part of a step
KEPT = (
    *("topology", "chips", "mesh", "train", "fits", "memory", "state", "hbm", "collectives", "seconds", "mfu_ceiling"),
    *("flops", "compiler", "jax", "seconds_to_compile"),
)


@dataclass(frozen=True)
class Point:
    """A slice, and what the settings of the base become on it."""

    topology: str
    batch: int
    accumulate: int = 1
    mesh: dict[str, int] = field(default_factory=lambda: {"data": 1, "fsdp": -1})


SLICES = {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16", 4096: "16x16x16"}
POINTS = {
    "one-1": Point("v5p:1x1x1", ROWS),
    **{f"weak-{n}": Point(f"v5p:{shape}", ROWS * n) for n, shape in SLICES.items()},
    **{f"strong-{n}": Point(f"v5p:{SLICES[n]}", 1024, 1024 // ROWS // n) for n in (4, 16, 64)},
    "strong-1024": Point("v5p:8x8x16", 1024),
    "strong-4096": Point("v5p:16x16x16", 1024, mesh={"data": 1, "fsdp": -1, "tensor": 4}),
    "layout-sequence": Point("v5p:16x16x16", 1024, mesh={"data": 1, "fsdp": -1, "sequence": 4}),
    "layout-data": Point("v5p:16x16x16", ROWS * 4096, mesh={"data": -1, "fsdp": 256}),
    "dcn-2": Point("2xv5p:4x8x8", ROWS * 512, mesh={"data": 2, "fsdp": -1}),
    "dcn-2-fsdp": Point("2xv5p:4x8x8", ROWS * 512),
}


def settings(point: Point) -> tuple[ModelConfig, TrainConfig]:
    """The model, with the attention kernel that TPUs have, and the training."""
    raw, _ = step.base(BASE)
    changes: dict[str, Any] = {
        "model.mixer.backend": "pallas",
        "train.batch": point.batch,
        "train.accumulate": point.accumulate,
        **{f"train.mesh.{name}": n for name, n in point.mesh.items()},
    }
    _, _, arm, _ = step.subject(raw, list(changes.items()), None, "train")
    return step.trained(arm, None)


def measure(point: Point) -> dict[str, Any]:
    """What the compiler says of a point."""
    try:
        one = certificate.certify(*settings(point), point.topology)
    except UserError as e:
        return {"topology": point.topology, "refused": str(e)}
    return {name: one[name] for name in KEPT if name in one}


def beside(point: Point) -> dict[str, Any]:
    """The estimate of a point and its theory: bytes that leave a chip in a step under `fsdp`, bfloat16 parameters
    gathered in the forward and in the backward pass and gradients scattered, in every part; and the tokens of a chip
    and part at which links need as long as arithmetic."""
    cfg, train = settings(point)
    chip, n = chips.CHIPS[chips.split(point.topology)[0]], chips.count(point.topology)
    sizes = train.mesh.sizes(n)
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    each = 3 * 2 * params.count(params.abstract(cfg)) / tensor * (fsdp - 1) / fsdp
    token = flops.per_token(cfg, train.data.seq_len) / chip.flops / tensor / sizes["sequence"]
    return {
        "tokens": train.tokens_per_step / n / train.accumulate,
        "estimate": estimate(cfg, train, point.topology)["memory"],
        "theory": {"bytes": train.accumulate * each, "crossover": each / chip.ici_rate / token},
    }


def draw(points: dict[str, Any], path: Path) -> None:
    """Seconds of each resource over chips, for both series, and bytes of a chip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    series = {
        name: sorted(
            (p["chips"], p) for key, p in points.items() if key.split("-")[0] in both and p.get("memory") is not None
        )
        for name, both in (("weak", ("weak",)), ("strong", ("strong",)))
    }
    if "weak-256" in points:  # the point that both series have
        series["strong"] = sorted([*series["strong"], (256, points["weak-256"])], key=lambda row: row[0])
    titles = {"weak": "16,384 tokens a chip and step", "strong": "4.2 M tokens a step"}
    for ax, (name, rows) in zip(axes, series.items(), strict=False):
        for resource, marker, said in (("compute", "o", "arithmetic"), ("ici", "s", "links"), ("hbm", "^", "memory")):
            ax.plot([n for n, _ in rows], [p["seconds"][resource] for _, p in rows], marker=marker, label=said)
        ax.set(xscale="log", yscale="log", xlabel="chips (v5p)", ylabel="seconds a step, at least", title=titles[name])
        ax.legend()
    for name, rows in series.items():
        axes[2].plot([n for n, _ in rows], [p["memory"]["peak"] / 2**30 for _, p in rows], marker="o", label=name)
    axes[2].axhline(chips.CHIPS["v5p"].hbm / 2**30, color="gray", linestyle="--", label="a chip has")
    axes[2].set(xscale="log", yscale="log", xlabel="chips (v5p)", ylabel="GiB of a chip, by the compiler")
    axes[2].legend()
    for ax in axes:
        ax.set_xticks(list(SLICES), [f"{n:,}" for n in SLICES], fontsize=8)
        ax.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(argv: Sequence[str]) -> int:
    """Raises `UserError` for any mistake in the input."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", help="points to make (default: all); none: only draw")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args(argv)
    names = list(POINTS) if args.only is None else args.only
    for name in names:
        if name not in POINTS:
            raise unknown("--only", name, POINTS)
    for name in names:
        if name in _points(args.out):
            continue
        found = measure(POINTS[name])
        points = _points(args.out) | {name: found}  # read again: others may write other points
        _write(args.out, points)
        print(f"{name}: {found.get('refused') or certified_text.verdict(found)}", flush=True)
    _write(args.out, {name: one | beside(POINTS[name]) for name, one in _points(args.out).items()})
    if args.png is not None:
        draw(_points(args.out), args.png)
    return 0


def _write(path: Path, points: dict[str, Any]) -> None:
    content = {"schema": SCHEMA, "base": BASE, "points": {key: points[key] for key in POINTS if key in points}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _points(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))["points"]) if path.exists() else {}


if __name__ == "__main__":
    cli.enter(lambda: cli.main(run))
