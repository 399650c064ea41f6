"""What a training step costs on a slice of TPUs, from the program that the TPU's own compiler makes of it.

The compiler runs anywhere; no TPU is needed. FLOPs are counted twice: by formula (`lm.train.flops`), what the model
needs, and over the compiled program, loops as often as they run (`lm.aot.cost`), what it does, with all that is
computed again. Seconds are those of each resource alone, perfectly used, at the rates of `lm.aot.chips`, for the
program as it is compiled; stages of a pipeline wait for each other as long as they must.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.aot import chips
from lm.aot.compiled import Compiled, compile_for
from lm.aot.cost import cost
from lm.aot.hlo import BETWEEN, Collective, collectives
from lm.aot.program import read
from lm.config import ModelConfig, to_dict
from lm.model import params
from lm.sharding.pipeline import bubble
from lm.train import flops
from lm.train.config import TrainConfig
from lm.train.placement import Placement
from lm.train.step import Beside, draws, initial

SCHEMA = 2
LARGEST = 8


def abstract(cfg: ModelConfig, train: TrainConfig, devices: Sequence[Any]) -> tuple[Placement, Any, Any, Beside]:
    """Placement, state, batch and what stays beside it, as shapes with shardings."""
    place = Placement(cfg, train, devices)
    whole = params.abstract(cfg)
    seed = 0 if draws(cfg, train) else None

    def fresh(whole: Any) -> Any:
        return initial(cfg, train, train.surgery.init(cfg, whole, jax.random.key(0)), seed)

    def placed(tree: Any) -> Any:
        shardings = place.shardings(tree)
        return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), tree, shardings)

    rows = train.objective.batch(train.batch, train.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place.rows) for name, x in rows.items()}
    return place, placed(jax.eval_shape(fresh, whole)), batch, Beside(placed(whole) if train.surgery.adds else None)


def bytes_on_device(tree: Any) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return float(
        sum(np.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )


def certify(cfg: ModelConfig, train: TrainConfig, topology: str) -> dict[str, Any]:
    """Compiles one training step for `topology` (``v5e:16x16``) and says what it needs; JSON-ready, bytes and seconds.

    Raises `UserError` for a slice that the compiler does not know, a missing compiler, and what does not divide. A
    program that exceeds the memory is no error: ``fits`` is False, ``largest`` lists what a chip holds, and
    ``largest_temporaries`` what it would have to.
    """
    devices = chips.devices(topology)
    place, state, batch, beside = abstract(cfg, train, devices)
    about = {
        "train": {k: to_dict(train)[k] for k in ("batch", "accumulate")} | {"seq_len": train.data.seq_len},
        "remat": cfg.remat,
        "state": {
            "parameters": bytes_on_device(state["params"]),
            "optimizer": bytes_on_device(state["opt"]),
            "frozen": bytes_on_device(beside.base),
        },
        "largest": largest((state, beside.base)),
    }
    stages = train.mesh.parts("layers", dict(place.mesh.shape))
    idle = bubble(stages, train.mesh.in_flight(stages))
    work = flops.per_token(cfg, train.data.seq_len, frozen=train.surgery.adds) * train.tokens_per_step
    found = measured(compile_for(place.lower(state, batch, beside)), topology, len(devices), work, idle)
    return {"step": "train", **header(cfg, topology, dict(place.mesh.shape)), **about, "bubble": idle, **found}


def header(cfg: ModelConfig, topology: str, mesh: dict[str, int]) -> dict[str, Any]:
    """What certificates of all steps begin with."""
    name, _ = chips.split(topology)
    return {
        "schema": SCHEMA,
        "topology": topology,
        "chips": int(np.prod(list(mesh.values()))),
        "mesh": mesh,
        "parameters": params.count(params.abstract(cfg)),
        "dtype": {"parameters": cfg.param_dtype, "compute": cfg.dtype},
        "backend": cfg.mixer.backend,
        "jax": jax.__version__,
        "hbm": chips.CHIPS[name].hbm,
    }


def measured(done: Compiled, topology: str, n: int, work: float, idle: float = 0.0) -> dict[str, Any]:
    """What a compiled program says of itself. `work`: FLOPs by formula, of all `n` chips together; `idle`: share of the
    time in which a stage of a pipeline waits."""
    chip = chips.CHIPS[chips.split(topology)[0]]
    fits = done.refusal is None and done.memory["peak"] <= chip.hbm
    out: dict[str, Any] = {"fits": fits, "memory": done.memory, "largest_temporaries": done.temporaries}
    out["seconds_to_compile"] = done.seconds
    if done.refusal is not None:
        return {**out, "compiler": done.refusal}
    program = read(done.text)
    found, total = collectives(program, n), cost(program)
    # What calls do that say nothing of it is taken from the formula.
    mine = max(total.flops, work / n) if total.silent else total.flops
    seconds = {
        "compute": max(mine, work / n / (1 - idle) if idle else 0.0) / chip.flops,
        "hbm": total.bytes / chip.hbm_rate,
        "ici": sum(c.times * c.sent for c in found if not c.kind.startswith(BETWEEN)) / chip.ici_rate,
    }
    if chips.slices(topology)[0] > 1:
        seconds["dcn"] = sum(c.times * c.sent for c in found if c.kind.startswith(BETWEEN)) / chip.dcn_rate
    return {
        **out,
        "flops": {
            "analytic": work,
            "compiled": total.flops * n,
            "kernels": total.kernels * n,
            "ratio": total.flops * n / work,
        },
        "bytes": total.bytes,
        "not_counted": sorted(total.silent),
        "loops_of_unknown_length": total.endless,
        "collectives": summed(found),
        "seconds": seconds,
        "bound": max(seconds, key=lambda name: seconds[name]),
        "mfu_ceiling": work / n / chip.flops / max(seconds.values()),
    }


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
            "bytes": bytes_on_device(leaf),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return sorted(rows, key=lambda r: -float(r["bytes"]))[:LARGEST]
