"""What generation costs on a slice of TPUs: the step that makes one token, and the reading of prompts.

The programs are those of `lm.decoding.generator`, for the smallest cache that loses nothing under the model's pattern,
with room for a text of a given length; parameters, caches and rows lie as the layout says (`lm.decoding.placement`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lm.aot import chips
from lm.aot.certificate import bytes_on_device, header, largest, measured
from lm.aot.compiled import compile_for
from lm.config import ModelConfig
from lm.decoding.generator import FIRST, PIECE
from lm.decoding.placement import Placement
from lm.errors import UserError
from lm.plug import INT32
from lm.sharding.layout import Layout
from lm.train import flops

STEPS = ("decode", "prefill")


@dataclass(frozen=True)
class Serve:
    """`batch` texts of `length` tokens, answers included; `quantize`: of the cache, None or ``int8``; `weights`: the
    parameters' type, None = the config's; `mesh`: where everything lies."""

    batch: int = 1
    length: int = 4096
    quantize: str | None = None
    weights: str | None = "bfloat16"
    mesh: Layout = field(default_factory=lambda: Layout(data=1, tensor=-1))

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: must be at least 1, found {getattr(self, name)}")
            if getattr(self, name) > INT32:
                raise UserError(f"--{name}: must be at most {INT32:,}, found {getattr(self, name)}")

    def model(self, cfg: ModelConfig) -> ModelConfig:
        return cfg if self.weights is None else dataclasses.replace(cfg, param_dtype=self.weights)


def certify(cfg: ModelConfig, serve: Serve, topology: str, step: str) -> dict[str, Any]:
    """Compiles ``decode`` or ``prefill`` for `topology`; JSON-ready, bytes and seconds, as `certificate.certify`.

    ``seconds`` are those of one token of every row, or of reading whole prompts: the first piece, which meets no cache,
    and others as often as it takes; the last of these is compiled, whose cache is full.
    """
    cfg = serve.model(cfg)
    devices = chips.devices(topology)
    place = Placement(cfg, serve.mesh, serve.batch, serve.length, devices, serve.quantize)
    about = {
        "step": step,
        **header(cfg, topology, dict(place.mesh.shape)),
        "serve": {"batch": serve.batch, "length": serve.length, "quantize": serve.quantize},
        "state": {"parameters": bytes_on_device(place.params), "cache": bytes_on_device(place.cache)},
        "largest": largest({"params": place.params, "cache": place.cache}),
    }
    n = len(devices)
    if step == "decode":
        work = flops.forward(cfg, serve.length - 1, 1) * serve.batch
        found = measured(compile_for(place.decode()), topology, n, work)
        return {**about, **found, **_rate(found, serve.batch)}
    pieces: list[dict[str, Any]] = []
    for tokens, runs, fresh in cut(serve.length):
        first, rest = tokens if fresh else FIRST, tokens if fresh else serve.length - FIRST
        work = flops.forward(cfg, 0 if fresh else first, rest, head=False) * serve.batch / runs
        piece = measured(compile_for(place.read(tokens, fresh)), topology, n, work)
        pieces.append({"tokens": tokens, "runs": runs, **piece})
    found = joined(pieces)
    return {**about, **found, **_rate(found, serve.batch * serve.length)}


def cut(length: int) -> list[tuple[int, int, bool]]:
    """Pieces in which a prompt is read: tokens, how many such, whether before all others."""
    first = min(FIRST, length)
    rest = -(-(length - first) // PIECE)
    return [(first, 1, True), *([(PIECE, rest, False)] if rest else [])]


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """One certificate of several programs that run after each other, each ``runs`` times."""
    fullest = max(pieces, key=lambda p: p["memory"].get("peak", 0.0))
    out: dict[str, Any] = {
        "fits": all(p["fits"] for p in pieces),
        "memory": fullest["memory"],
        "largest_temporaries": fullest["largest_temporaries"],
        "seconds_to_compile": sum(p["seconds_to_compile"] for p in pieces),
    }
    refused = [p["compiler"] for p in pieces if "compiler" in p]
    if refused:
        return {**out, "compiler": refused[0]}

    def total(*keys: str) -> float:
        sum_ = 0.0
        for p in pieces:
            at: Any = p
            for key in keys:
                at = at[key]
            sum_ += p["runs"] * at
        return sum_

    names = ("analytic", "compiled", "kernels")
    work = {name: total("flops", name) for name in names}
    seconds = {name: total("seconds", name) for name in pieces[0]["seconds"]}
    least = sum(p["runs"] * max(p["seconds"].values()) for p in pieces)
    ideal = sum(p["runs"] * p["mfu_ceiling"] * max(p["seconds"].values()) for p in pieces)
    kinds = sorted({kind for p in pieces for kind in p["collectives"]})
    return {
        **out,
        "flops": {**work, "ratio": work["compiled"] / work["analytic"]},
        "bytes": total("bytes"),
        "not_counted": sorted({name for p in pieces for name in p["not_counted"]}),
        "loops_of_unknown_length": sum(p["loops_of_unknown_length"] for p in pieces),
        "collectives": {
            kind: {
                key: sum(
                    (1 if key == "sites" else p["runs"]) * p["collectives"].get(kind, {}).get(key, 0) for p in pieces
                )
                for key in ("sites", "runs", "bytes")
            }
            for kind in kinds
        },
        "seconds": seconds,
        "least_seconds": least,
        "bound": max(seconds, key=lambda name: seconds[name]),
        "mfu_ceiling": ideal / least,
        "pieces": [{key: p[key] for key in ("tokens", "runs", "seconds")} for p in pieces],
    }


def _rate(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    if "seconds" not in found:
        return {}
    least = found.get("least_seconds") or max(found["seconds"].values())
    return {"least_seconds": least, "tokens_per_second": tokens / least}
