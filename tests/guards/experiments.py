"""What addresses committed results: the content hashes of all their points; and the programs of ``:smoke`` scales."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.running.cache import key
from experiments.running.job import make
from experiments.running.plan import Plan, prepare
from experiments.spec import registry
from guards import models
from lm.config import to_dict
from lm.model import params as params_lib
from lm.plug import table

RESULTS = Path(__file__).resolve().parents[2] / "results"


def hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def planned(config: dict[str, Any]) -> Plan:
    return prepare(config, (), None, absent_is_fine=True)


def keys() -> dict[str, dict[str, str]]:
    """By result: the hash of its settings as they are built again, and of what determines its points. What a text or
    a checkpoint holds is left out."""
    out = {}
    for file in sorted(RESULTS.glob("*/results.json")):
        config = json.loads(file.read_text())["config"]
        plan = planned(config)
        points = []
        for job in make(plan):
            arm, training = plan.arms[job.arm], None
            if job.trains:
                assert arm.train is not None
                training = {"model": to_dict(arm.trained), "train": arm.train.determines(), "seed": job.seed}
            measure = to_dict(job.plug, table("lm.measures"))
            points.append(key(job.what("", {json.dumps(measure, sort_keys=True): ""}, "cpu", training)))
        out[file.parent.name] = {"settings": hashed(plan.exp.to_dict()), "points": hashed(points)}
    return out


def smoke() -> dict[str, Any]:
    """Lowered, of every ``:smoke`` scale: the training step of its first and its last arm, or their forward pass."""
    out: dict[str, Any] = {}
    for path in registry.files():
        plan = planned(registry.load(path).settings("smoke"))
        names = list(plan.arms)
        for name in dict.fromkeys((names[0], names[-1])):
            arm = plan.arms[name]
            if arm.train is not None and arm.trained is not None:
                out[f"{path.stem}:smoke {name}"] = models.lowered_step(arm.trained, arm.train, jax.devices()[:1])
            else:
                run = jax.jit(lambda p, t, cfg=arm.config: models.logits(cfg, p, t))
                tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
                out[f"{path.stem}:smoke {name}"] = run.lower(params_lib.abstract(arm.config), tokens)
    return out
