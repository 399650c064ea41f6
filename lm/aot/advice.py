"""What to change where a step does not fit, by the estimate; and layouts worth trying, the promising ones first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm.aot import chips
from lm.aot.estimate import estimate
from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import params
from lm.sharding.layout import Layout
from lm.train import flops
from lm.train.config import TrainConfig

GIB = 2**30
HOPELESS = 1.25  # of a chip's memory: estimates have been wrong by up to a fifth

# Slices of each generation that Cloud TPU offers, smallest first.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}

Variant = tuple[ModelConfig, TrainConfig, str]


def advice(cfg: ModelConfig, train: TrainConfig, topology: str, needed: float | None) -> list[str]:
    """For each way to need less memory, the smallest change of that kind that fits by the estimate, with what a chip
    then holds. `needed`: bytes that the compiler asked for, by which the estimates are corrected upwards."""
    now = _peak(cfg, train, topology)
    error = max(1.0, needed / now) if needed and now else 1.0
    hbm = chips.CHIPS[chips.split(topology)[0]].hbm
    out = []
    for changes in _changes(cfg, train, topology):
        for model, settings, slice_, said in changes:
            peak = _peak(model, settings, slice_)
            if peak is not None and peak * error <= hbm:
                out.append(f"{said}: {peak * error / GIB:.2f} GiB")
                break
    return out


def _peak(cfg: ModelConfig, train: TrainConfig, topology: str) -> float | None:
    try:
        return float(estimate(cfg, train, topology)["memory"]["peak"])
    except UserError:  # does not divide
        return None


def _changes(
    cfg: ModelConfig, train: TrainConfig, topology: str
) -> Iterator[list[tuple[ModelConfig, TrainConfig, str, str]]]:
    """Lists of changes of one kind, the mildest first."""
    name, shape = chips.split(topology)
    sizes = train.mesh.sizes(chips.count(topology))
    if not cfg.remat:
        yield [(dataclasses.replace(cfg, remat=True), train, topology, "model.remat=True")]
    rows = train.batch // train.mesh.parts("batch", sizes)
    parts = [n for n in range(2 * train.accumulate, rows + 1) if rows % n == 0]
    yield [(cfg, dataclasses.replace(train, accumulate=n), topology, f"train.accumulate={n}") for n in parts]
    if sizes["data"] > 1:
        mesh = dataclasses.replace(train.mesh, data=1, fsdp=sizes["data"] * sizes["fsdp"])
        said = f"train.mesh.data=1 train.mesh.fsdp={mesh.fsdp}"
        yield [(cfg, dataclasses.replace(train, mesh=mesh), topology, said)]
    for axis in ("tensor", "sequence"):
        yield list(_moved(cfg, train, topology, sizes, axis))
    at = SLICES[name].index(shape) if shape in SLICES[name] else -1
    larger = []
    for other in SLICES[name][at + 1 :] if at >= 0 else ():
        mesh = train.mesh.resized({**sizes, "data": 1, "fsdp": -1})
        said = f"--topology={name}:{other} train.mesh.data=1 train.mesh.fsdp=-1"
        larger.append((cfg, dataclasses.replace(train, mesh=mesh), f"{name}:{other}", said))
    yield larger


def _moved(
    cfg: ModelConfig, train: TrainConfig, topology: str, sizes: dict[str, int], axis: str
) -> Iterator[tuple[ModelConfig, TrainConfig, str, str]]:
    """More chips along `axis`, taken from those that hold rows."""
    for n in (2, 4, 8):
        source = "data" if sizes["data"] % n == 0 else "fsdp" if sizes["fsdp"] % n == 0 else None
        if source is None:
            continue
        changed = {**sizes, source: sizes[source] // n, axis: sizes[axis] * n}
        mesh = train.mesh.resized(changed)
        said = f"train.mesh.{source}={changed[source]} train.mesh.{axis}={changed[axis]}"
        yield cfg, dataclasses.replace(train, mesh=mesh), topology, said


def variants(train: TrainConfig, cfg: ModelConfig, n: int) -> list[Variant]:
    """Layouts for `n` chips worth trying, with and without remat and in one to sixteen parts; those that divide.

    `tensor` up to 8; `expert`, where there are experts, up to their number; `sequence`, where rows are longer than what
    a batch has rows for, or 8,192 tokens and longer; `data` and `fsdp` share the rest.
    """
    experts = max(layer.ffn.n_experts for layer in cfg.layers())
    long = train.data.seq_len >= 8192 or train.batch < n
    found: dict[str, Variant] = {}
    for expert in [e for e in (1, 2, 4, 8, 16, 32, 64) if experts % e == 0 and e <= experts]:
        for sequence in (1, 2, 4) if long else (1,):
            for tensor in (1, 2, 4, 8):
                if n % (expert * sequence * tensor):
                    continue
                rest = n // (expert * sequence * tensor)
                for fsdp in dict.fromkeys((rest, min(rest, 64), min(rest, 16))):
                    sizes = {"data": rest // fsdp, "fsdp": fsdp, "expert": expert}
                    sizes |= {"sequence": sequence, "tensor": tensor, "stage": 1}
                    if rest % fsdp or not _divides(train, cfg, sizes):
                        continue
                    for settings, model, said in _parts(train, cfg, sizes):
                        found.setdefault(said, (model, settings, said))
    return list(found.values())


def _divides(train: TrainConfig, cfg: ModelConfig, sizes: dict[str, int]) -> bool:
    layout = train.mesh.resized(sizes)
    axes = params.axes(cfg)
    shapes = {k: (v.shape, axes[k]) for k, v in params.names(params.abstract(cfg)).items()}
    try:
        layout.check(shapes, sizes)
    except UserError:
        return False
    return train.data.seq_len % layout.parts("length", sizes) == 0


def _parts(
    train: TrainConfig, cfg: ModelConfig, sizes: dict[str, int]
) -> Iterator[tuple[TrainConfig, ModelConfig, str]]:
    mesh: Layout = train.mesh.resized(sizes)
    rows = mesh.parts("batch", sizes)
    where = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one chip"
    for accumulate in (1, 2, 4, 8, 16):
        if train.batch % accumulate or (train.batch // accumulate) % rows:
            continue
        settings = dataclasses.replace(train, mesh=mesh, accumulate=accumulate)
        for remat in (True, False):
            said = f"{where}; remat {remat}, accumulate {accumulate}"
            yield settings, dataclasses.replace(cfg, remat=remat), said


def quick(cfg: ModelConfig, train: TrainConfig, topology: str) -> float:
    """Seconds of a step by arithmetic alone, to try the promising first: products at full rate, and what crosses the
    links: layers' matrices and gradients over `fsdp` and `data`, activations over `tensor`, rows over `expert`."""
    chip, n = chips.CHIPS[chips.split(topology)[0]], chips.count(topology)
    sizes = train.mesh.sizes(n)
    again = 4 / 3 if cfg.remat else 1.0
    compute = again * flops.per_token(cfg, train.data.seq_len) * train.tokens_per_step / n / chip.flops
    cut = sizes["tensor"] * sizes["expert"] * sizes["stage"]
    mine = params.count(params.abstract(cfg)) / cut
    tokens = train.tokens_per_step / (n / sizes["tensor"])
    passes = 2 if not cfg.remat else 3
    sent = train.accumulate * mine * (2 * (passes - 1) + 4) * (1 - 1 / sizes["fsdp"])
    sent += 2 * 4 * train.accumulate * mine / sizes["fsdp"] * (1 - 1 / sizes["data"])
    sent += cfg.n_layers * 2 * passes * 2 * 2 * tokens * cfg.d_model * (1 - 1 / sizes["tensor"])
    k = max(layer.ffn.choices for layer in cfg.layers())
    sent += cfg.n_layers * 2 * passes * k * 2 * tokens * cfg.d_model * (1 - 1 / sizes["expert"])
    return max(compute, sent / chip.ici_rate)


def promising(train: TrainConfig, cfg: ModelConfig, topology: str) -> tuple[list[Variant], list[tuple[str, str]]]:
    """`variants` that may fit by the estimate, the quickest by `quick` first; and the others, each with why not."""
    hbm = chips.CHIPS[chips.split(topology)[0]].hbm
    good: list[tuple[float, int, Variant]] = []
    bad: list[tuple[str, str]] = []
    for at, (model, settings, said) in enumerate(variants(train, cfg, chips.count(topology))):
        try:
            peak = float(estimate(model, settings, topology)["memory"]["peak"])
        except UserError as e:
            bad.append((said, str(e)))
            continue
        if peak > HOPELESS * hbm:
            bad.append((said, f"{peak / GIB:.1f} of {hbm / GIB:.1f} GiB by the estimate"))
        else:
            good.append((quick(model, settings, topology), at, (model, settings, said)))
    return [v for _, _, v in sorted(good, key=lambda row: row[:2])], bad


def serving(about: dict[str, Any], hbm: float, error: float = 1.0) -> list[str]:
    """The same for generation, from what a chip of a certificate holds: fewer rows, more chips, a smaller cache."""
    held, serve, mesh = about["state"], about["serve"], about["mesh"]
    total, out = error * (held["parameters"] + held["cache"]), []
    rows = [n for n in range(serve["batch"] - 1, 0, -1) if serve["batch"] % n == 0]
    for n in rows:
        peak = total - error * held["cache"] * (1 - n / serve["batch"])
        if peak <= hbm:
            out.append(f"--batch={n}: {peak / GIB:.2f} GiB")
            break
    if serve["quantize"] is None and total - error * held["cache"] * 0.48 <= hbm:
        out.append(f"--quantize=int8: {(total - error * held['cache'] * 0.48) / GIB:.2f} GiB")
    name, shape = chips.split(about["topology"])
    for other in SLICES[name]:
        n = chips.count(f"{name}:{other}")
        if n > about["chips"] and n % about["chips"] == 0 and total * about["chips"] / n <= hbm:
            tensor = mesh["tensor"] * n // about["chips"]
            said = f"--topology={name}:{other} --mesh=tensor={tensor}"
            out.append(f"{said}: {total * about['chips'] / n / GIB:.2f} GiB, where heads divide")
            break
    return out
