"""What layers report beside their output: losses of their own, statistics, and parameters that move by a rule.

A layer's report is a dict, empty for most layers:

* ``loss``: a float32 scalar, weighted already; the mean over reporting layers joins the training loss;
* ``sums``: float32 arrays that add up over the parts of a batch and over batches;
* ``taps``: arrays per token, only when the decoder was asked for taps.

The layer's plug may say what its sums mean: ``report(sums) -> {name: number or list}`` for the log, and
``update(params, sums) -> {name: array}`` for parameters that no gradient moves; the training step puts those in place
of what the optimizer made of them. Objective, training step and log know this protocol and no method.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError

Reports = tuple[dict[str, Any], ...]  # one per layer
Sums = tuple[dict[str, Any], ...]


def has_reports(cfg: ModelConfig) -> bool:
    """Whether any layer reports, and so wants to know that it is trained."""
    return any(getattr(layer.ffn, "reports", False) for layer in cfg.layers())


def add(reports: Reports, loss: jax.Array, sums: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """An objective's `loss` (a sum over targets) and `sums`, with the layers' own losses and sums added.

    `loss` grows by the mean of the layers' losses times the weight of the targets, so that dividing by that weight
    leaves the mean itself; `sums` gains ``aux``. Both stay as they are where no layer reports.
    """
    own = [r["loss"] for r in reports if "loss" in r]
    if own:
        loss = loss + sums["weight"] * jnp.stack(own).mean()
    if any("sums" in r for r in reports):
        sums = {**sums, "aux": jax.tree.map(jax.lax.stop_gradient, tuple(r.get("sums", {}) for r in reports))}
    return loss, sums


def merge_microbatches(said: Any) -> Any:
    """``(taps, records, report)`` of stacked layers, from those of the parts of a batch on a leading axis: losses are
    means over the parts, sums add up. Raises `UserError` where taps or records were asked for."""
    taps, records, reports = said
    if jax.tree.leaves((taps, records, reports.get("taps"))):
        raise UserError("train.mesh.stage: taps and records of layers do not come from stages; valid: 1")
    how = {"loss": jnp.mean, "sums": jnp.sum}
    return taps, records, {name: jax.tree.map(lambda a, f=how[name]: f(a, axis=0), x) for name, x in reports.items()}


def apply_rule_updates(cfg: ModelConfig, old: Any, new: Any, sums: Sums) -> Any:
    """Parameters `new` with those that move by a rule set by it, from `old` ones and the step's `sums`."""
    for i, (layer, own) in enumerate(zip(cfg.layers(), sums, strict=True)):
        rule = getattr(layer.ffn, "update", None)
        if rule is None or not own:
            continue
        stacked = "blocks" in old
        before = jax.tree.map(lambda p, i=i: p[i], old["blocks"]) if stacked else old[f"blocks_{i}"]
        for name, value in rule(before["ffn"], own).items():
            place = ["blocks" if stacked else f"blocks_{i}", "ffn", *name.split("/")]
            new = _put(new, place, value, i if stacked else None)
    return new


def _put(tree: Any, path: list[str], value: jax.Array, i: int | None) -> Any:
    if not path:
        return value.astype(tree.dtype) if i is None else tree.at[i].set(value.astype(tree.dtype))
    return {**tree, path[0]: _put(tree[path[0]], path[1:], value, i)}


def report(cfg: ModelConfig, sums: Sums, whole: bool = False) -> dict[str, Any]:
    """Numbers for the log, each the mean over the layers that report it; `whole`: lists too, one entry per layer."""
    found: dict[str, list[Any]] = {}
    for layer, own in zip(cfg.layers(), sums, strict=True):
        say = getattr(layer.ffn, "report", None)
        for name, value in (say({k: np.asarray(v, np.float64) for k, v in own.items()}) if say and own else {}).items():
            found.setdefault(name, []).append(value)
    out: dict[str, Any] = {}
    for name, values in found.items():
        if not isinstance(values[0], list):
            out[name] = float(np.mean(values))
        elif whole:
            out[name] = values
    return out
