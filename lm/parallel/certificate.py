"""What a training step costs on a slice of TPUs, from the program that the TPU's own compiler makes of it.

The compiler runs anywhere; no TPU is needed. Bytes and collectives are the compiler's. FLOPs are counted by formula
(`lm.train.flops`), because the compiler counts the body of a loop once. Seconds are lower bounds: each resource alone,
perfectly used, at the rates of `lm.parallel.chips`; stages of a pipeline wait for each other as long as they must.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import params
from lm.config import ModelConfig, to_dict
from lm.parallel import chips
from lm.parallel.hlo import BETWEEN, Collective, collectives
from lm.parallel.pipeline import bubble
from lm.train import flops
from lm.train.config import TrainConfig
from lm.train.placement import Placement
from lm.train.step import draws, initial

SCHEMA = 1
LARGEST = 8


def abstract(cfg: ModelConfig, train: TrainConfig, devices: Sequence[Any]) -> tuple[Placement, Any, Any, Any]:
    """Placement, state, batch and base (where the surgery adds to parameters that stay), as shapes with shardings."""
    place = Placement(cfg, train, devices)
    whole = params.abstract(cfg)
    seed = 0 if draws(cfg, train) else None

    def fresh(whole: Any) -> Any:
        return initial(train.surgery.init(cfg, whole, jax.random.key(0)), train, seed)

    def placed(tree: Any) -> Any:
        shardings = place.shardings(tree)
        return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), tree, shardings)

    shape, kinds = (
        (train.batch, train.data.seq_len),
        {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32},
    )
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=place.rows) for name, kind in kinds.items()}
    return place, placed(jax.eval_shape(fresh, whole)), batch, placed(whole) if train.surgery.adds else None


def held(tree: Any) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return float(
        sum(np.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )


def certify(cfg: ModelConfig, train: TrainConfig, topology: str) -> dict[str, Any]:
    """Compiles one training step for `topology` (``v5e:16x16``) and says what it needs; JSON-ready, bytes and seconds.

    Raises `UserError` for a slice that the compiler does not know, a missing compiler, and what does not divide. A
    program that exceeds the memory is no error: ``fits`` is False, and ``largest`` lists what a chip holds.
    """
    name, _ = chips.split(topology)
    chip, devices = chips.CHIPS[name], chips.devices(topology)
    place, state, batch, base = abstract(cfg, train, devices)
    start = time.perf_counter()
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(place.mesh.shape),
        "train": {k: to_dict(train)[k] for k in ("batch", "accumulate")} | {"seq_len": train.data.seq_len},
        "parameters": params.count(params.abstract(cfg)),
        "remat": cfg.remat,
        "jax": jax.__version__,
        "hbm": chip.hbm,
        "state": {"parameters": held(state["params"]), "optimizer": held(state["opt"]), "frozen": held(base)},
        "largest": largest((state, base)),
    }
    try:
        compiled, program = compile_for(place.lower(state, batch, base))
    except Exception as e:
        said = str(e)
        if "RESOURCE_EXHAUSTED" not in said and "hbm" not in said.lower():
            raise
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return {**out, "fits": False, "compiler": lines[0][:300], "seconds_to_compile": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = collectives(program, len(devices))
    stages = train.mesh.parts("layers", dict(place.mesh.shape))
    idle = bubble(stages, train.mesh.in_flight(stages))
    work = flops.per_token(cfg, train.data.seq_len, frozen=train.surgery.adds) * train.tokens_per_step
    seconds = {
        "compute": work / len(devices) / chip.flops / (1 - idle),
        "hbm": (memory.argument_size_in_bytes + memory.output_size_in_bytes) / chip.hbm_rate,
        "ici": sum(c.times * c.sent for c in found if not c.kind.startswith(BETWEEN)) / chip.ici_rate,
    }
    if chips.slices(topology)[0] > 1:
        seconds["dcn"] = sum(c.times * c.sent for c in found if c.kind.startswith(BETWEEN)) / chip.dcn_rate
    cost = compiled.cost_analysis() or {}
    return {
        **out,
        "fits": peak <= chip.hbm,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "peak": peak,
        },
        "flops": {"analytic": work, "compiled_loops_once": cost.get("flops", 0.0) * len(devices)},
        "bytes_loops_once": cost.get("bytes accessed"),
        "collectives": summed(found),
        "bubble": idle,
        "seconds": seconds,
        "mfu_ceiling": (1 - idle) * seconds["compute"] / max(seconds.values()),
        "seconds_to_compile": time.perf_counter() - start,
    }


def compile_for(lowered: Any) -> tuple[Any, str]:
    """The compiled program and its text, as the compiler writes it: jaxlib cannot read back every instruction of a
    TPU's program (transfers on a SparseCore)."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda p: p.stat().st_size)
        return compiled, texts[-1].read_text(encoding="utf-8")


def summed(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many, how often all of them together run in a step, and the bytes that leave a chip."""
    out: dict[str, dict[str, float]] = {}
    for c in found:
        row = out.setdefault(c.kind, {"sites": 0, "runs": 0, "bytes": 0.0})
        row["sites"], row["runs"], row["bytes"] = (
            row["sites"] + 1,
            row["runs"] + c.times,
            row["bytes"] + c.times * c.sent,
        )
    return dict(sorted(out.items()))


def largest(tree: Any) -> list[dict[str, Any]]:
    """The tensors of which one chip holds most."""
    rows: list[dict[str, Any]] = [
        {
            "name": jax.tree_util.keystr(path, simple=True, separator="/"),
            "shape": list(leaf.shape),
            "spec": str(leaf.sharding.spec),
            "bytes": held(leaf),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return sorted(rows, key=lambda r: -float(r["bytes"]))[:LARGEST]


def variants(train: TrainConfig, cfg: ModelConfig, n: int) -> list[tuple[ModelConfig, TrainConfig, str]]:
    """Layouts for `n` chips worth trying, with and without remat and in one to four parts; those that divide."""
    out = []
    for tensor in (1, 2, 4, 8):
        for fsdp in dict.fromkeys((n // tensor, min(n // tensor, 64), min(n // tensor, 16))):
            if n % (tensor * fsdp):
                continue
            mesh = dataclasses.replace(train.mesh, data=n // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            for remat in (True, False):
                for accumulate in (1, 2, 4):
                    if train.batch % accumulate:
                        continue
                    settings = dataclasses.replace(train, mesh=mesh, accumulate=accumulate)
                    said = f"data {mesh.data}, fsdp {fsdp}, tensor {tensor}, remat {remat}, accumulate {accumulate}"
                    out.append((dataclasses.replace(cfg, remat=remat), settings, said))
    return out
