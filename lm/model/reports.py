"""What layers report beside their output: losses of their own, statistics, and parameters that move by a rule.

A layer's report is a dict, empty for most layers:

* ``loss``: a float32 scalar, weighted already; the mean over reporting layers joins the training loss;
* ``sums``: float32 arrays that add up over the parts of a batch and over batches.

The layer's plug says what its sums mean (`lm.ffn.base.FFN`): ``report`` for the log, and ``update`` for parameters that
no gradient moves; the training step puts those in place of what the optimizer made of them. An objective never sees
reports: `lm.objectives.forward.Forward` collects them, and the training step adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    return any(layer.ffn.reports for layer in cfg.layers())


def add(calls: Sequence[Reports], loss: jax.Array, sums: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """An objective's `loss` (a sum over targets) and `sums`, with the layers' own losses and sums added: of every call
    of the model that it has made.

    `loss` grows by the mean of the layers' losses times the weight of the targets, so that dividing by that weight
    leaves the mean itself; `sums` gains ``aux``. Both stay as they are where no layer reports.
    """
    own = [r["loss"] for reports in calls for r in reports if "loss" in r]
    if own:
        loss = loss + sums["weight"] * jnp.stack(own).mean()
    told = [tuple(r.get("sums", {}) for r in reports) for reports in calls]
    if any(r for reports in told for r in reports):
        total = functools.reduce(functools.partial(jax.tree.map, jnp.add), told)
        sums = {**sums, "aux": jax.tree.map(jax.lax.stop_gradient, total)}
    return loss, sums


def merge_microbatches(made: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Taps and report of a layer, from those of the parts of a batch on a leading axis: losses are means over the
    parts, sums add up. Raises `UserError` where something was watched: it does not come from stages."""
    taps, report = made
    if jax.tree.leaves(taps):
        raise UserError("train.mesh.stage: taps of layers do not come from stages; valid: 1")
    how = {"loss": jnp.mean, "sums": jnp.sum}
    return taps, {name: jax.tree.map(lambda a, f=how[name]: f(a, axis=0), x) for name, x in report.items()}


def apply_rule_updates(cfg: ModelConfig, old: dict[str, Any], new: dict[str, Any], sums: Sums) -> dict[str, Any]:
    """Parameters `new` with those that move by a rule set by it, from `old` ones and the step's `sums`."""
    for i, (layer, own) in enumerate(zip(cfg.layers(), sums, strict=True)):
        if not own:
            continue
        stacked = "blocks" in old
        before = jax.tree.map(lambda p, i=i: p[i], old["blocks"]) if stacked else old[f"blocks_{i}"]
        for name, value in layer.ffn.update(before["ffn"], own).items():
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
        told = layer.ffn.report({k: np.asarray(v, np.float64) for k, v in own.items()}) if own else {}
        for name, value in told.items():
            found.setdefault(name, []).append(value)
    out: dict[str, Any] = {}
    for name, values in found.items():
        if not isinstance(values[0], list):
            out[name] = float(np.mean(values))
        elif whole:
            out[name] = values
    return out
