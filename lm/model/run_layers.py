"""How a stack of layers is run: scanned where equal, rematerialised, in stages, gathered one ahead, one key each.

Nothing here says what a layer is (`lm.model.block`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError

from lm import weights
from lm.attention.branches import Keys
from lm.caches import Caches
from lm.caches.base import State
from lm.config import ModelConfig
from lm.layer import LayerInputs, Report
from lm.model.block import Block
from lm.model.inputs import Inputs
from lm.model.reports import merge_microbatches
from lm.model.taps import STREAM, Taps, named
from lm.sharding.layout import gather_after
from lm.sharding.pipeline import run_stack

Params = Any
Step = Callable[..., tuple[jax.Array, "LayerResult"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerResult:
    """What a layer leaves beside the stream: its `cache`, `taps`, `report`, and the keys that no cache has kept."""

    cache: State | None = None
    taps: Taps = field(default_factory=dict)
    report: Report = field(default_factory=dict)
    fresh: Keys | None = None


def run_layers(
    scope: nn.Module, cfg: ModelConfig, x_BTD: jax.Array, layer: LayerInputs, cache: Caches | None
) -> tuple[jax.Array, list[LayerResult]]:
    """The stream after all layers, and what each has left; parameters are declared on `scope`.

    Consecutive layers of equal configuration are one scan over stacked parameters, so that the program does not grow
    with their number; behind a cache every layer is run by itself.
    """
    layers = cfg.layers()
    params, stacked = _declare(scope, x_BTD.shape[-1], layers)
    if scope.is_initializing():
        return x_BTD, []  # nobody reads the result
    keys = None if layer.key is None else jax.random.split(layer.key, len(layers))
    results: list[LayerResult] = []
    start, before = 0, x_BTD
    for n in _runs(layers, cfg.scan_layers and stacked and cache is None):
        step, rows = _step(layers[start], layer, n), dataclasses.replace(layer, key=None, length=None)  # type: ignore[arg-type]
        if n > 1:
            own = jax.tree.map(lambda p, a=start, b=start + n: p[a:b], params)
            own_keys = None if keys is None else keys[start : start + n]
            x_BTD, made = _scanned(step, x_BTD, rows, own, own_keys)
            results += [jax.tree.map(lambda a, i=i: a[i], made) for i in range(n)]
        else:
            p = jax.tree.map(lambda p, i=start: p[i], params) if stacked else params[start]
            p, before = p if stacked else gather_after(p, before), x_BTD
            state = None if cache is None else cache[start]
            x_BTD, result = step(x_BTD, rows, p, None if keys is None else keys[start], state)
            results.append(result)
        start += n
    return x_BTD, results


def _step(cfg: ModelConfig, layer: LayerInputs, n: int) -> Step:
    """One layer as a function of the stream, its rows' inputs, its parameters, its key and its cache; `n`: how many
    layers in a row the function will serve."""
    watch, length = layer.watch, layer.length

    def run(
        x: jax.Array, rows: LayerInputs, p: Params, key: jax.Array | None, cache: State | None = None
    ) -> tuple[jax.Array, LayerResult]:
        inputs = dataclasses.replace(rows, key=key, length=length)
        variables = {"params": p}
        out, made = Block(cfg).apply(variables, x, inputs, cache, mutable=["taps"] if watch.taps else [])
        if watch.on_layer is not None:
            tick = watch.on_layer
            jax.debug.callback(lambda _: tick(), out.x[0, -1, 0])
        taps = named(made.get("taps", {}))
        if watch.wants(STREAM):
            taps[STREAM] = watch.reduced(out.x)
        return out.x, LayerResult(out.cache, taps, out.report, out.fresh)

    # A scan's body is compiled by itself: there, what is computed again cannot be merged with the first time.
    return jax.checkpoint(run, prevent_cse=n == 1) if cfg.remat else run


def _scanned(
    step: Step, x: jax.Array, rows: LayerInputs, params: Params, keys: jax.Array | None
) -> tuple[jax.Array, LayerResult]:
    """Equal layers one after the other, or in stages (`lm.sharding.pipeline`); results are stacked."""

    def body(x: jax.Array, rows: LayerInputs, own: tuple[Params, jax.Array | None]) -> tuple[jax.Array, LayerResult]:
        return step(x, rows, *own)

    return run_stack(body, x, rows, (params, keys), _joined)


def _joined(made: LayerResult) -> LayerResult:
    taps, report = merge_microbatches((made.taps, made.report))
    return LayerResult(None, taps, report)


def _declare(scope: nn.Module, width: int, layers: Sequence[ModelConfig]) -> tuple[Params, bool]:
    """All layers' parameters, declared on `scope`: one stacked tree, or one tree per layer where shapes differ.

    They are found by tracing `Block.init`, and not by `nn.scan`: layers of equal shapes share the stacked tree whatever
    plugs run on them, while a lifted scan would run one layer's plugs for all.
    """
    shapes = [_shapes(cfg, width) for cfg in dict.fromkeys(layers)]
    if all(s == shapes[0] for s in shapes) and not scope.has_variable("params", "blocks_0"):

        def stack(rng: jax.Array) -> Params:
            with weights.inside("blocks", ("layers",)):
                return jax.vmap(lambda r: _init(layers[0], width, r))(jax.random.split(rng, len(layers)))

        made = weights.param(scope, "blocks", stack)
        if (found := {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(made)}) != {(len(layers),)}:
            raise ScopeParamShapeError("blocks", "", (*found,), (len(layers),))
        return made, True

    def one(i: int, rng: jax.Array) -> Params:
        with weights.inside(f"blocks_{i}"):
            return _init(layers[i], width, rng)

    return [weights.param(scope, f"blocks_{i}", lambda r, i=i: one(i, r)) for i in range(len(layers))], False


def _init(cfg: ModelConfig, width: int, rng: jax.Array) -> Params:
    """Random parameters of one layer on a stream of `width`."""
    inputs = Inputs(tokens_BT=jnp.zeros((1, 1), jnp.int32))
    tokens = inputs.tokens((1, 1), cfg.positions)
    x, layer = jnp.zeros((1, 1, width), cfg.dtype), LayerInputs(tokens, jnp.ones(()), tokens.index_BT)
    return dict(Block(cfg).init(rng, x, layer, None))["params"]


@functools.lru_cache(maxsize=256)
def _shapes(cfg: ModelConfig, width: int) -> Params:
    """Their shapes and types. Kept, because tracing a layer takes longer the more programs run on it."""
    return jax.eval_shape(lambda rng: _init(cfg, width, rng), jax.random.key(0))


def _runs(layers: Sequence[ModelConfig], scan: bool) -> list[int]:
    """Lengths of the runs of equal consecutive layers (all 1 when not scanning)."""
    runs: list[int] = []
    for i, cfg in enumerate(layers):
        if scan and i and cfg == layers[i - 1]:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs
