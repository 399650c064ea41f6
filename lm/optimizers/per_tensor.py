"""Optimizers with statistics per tensor, applied to leaves that stack many tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from lm.model.params import Axes


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def per_tensor(tx: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`tx` on every tensor by itself: a leaf that stacks layers or experts is mapped over, so that a stacked and an
    unstacked tree get the same updates. The state is a tree like the parameters with a state of `tx` per leaf."""

    def over(fn: Callable[..., Any], n: int) -> Callable[..., Any]:
        for _ in range(n):
            fn = jax.vmap(fn)
        return fn

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p, n: over(tx.init, n)(p), params, axes.stacks(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat, treedef = jax.tree.leaves(updates), _structure(updates)
        states = treedef.flatten_up_to(state)
        values = [None] * len(flat) if params is None else treedef.flatten_up_to(params)
        done = []
        for g, s, p, n in zip(flat, states, values, treedef.flatten_up_to(axes.stacks(updates)), strict=True):
            call = (lambda g, s: tx.update(g, s)) if p is None else tx.update
            done.append(over(call, n)(*((g, s) if p is None else (g, s, p))))
        return treedef.unflatten([u for u, _ in done]), treedef.unflatten([s for _, s in done])

    return optax.GradientTransformation(init, update)
