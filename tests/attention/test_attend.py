"""What `auto` runs on a training batch: small tiles, chosen by the number of rows; equal to the dense reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import rms_ratio

from lm.attention.attend import attend
from lm.attention.branches import Context, Keys, Tokens
from lm.config import merge, model_config
from lm.model import params as params_lib
from lm.model.language_model import DecoderModel
from lm.objectives.causal import Causal
from lm.objectives.forward import Forward
from lm.patterns import TABLE
from lm.positions.alibi import Alibi
from lm.positions.nope import NoPE
from lm.positions.rope import Rope

B, T, H, D = 16, 150, 8, 4  # 128 rows: tiles of 64, the last one ragged
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"kv": 2},
    "segments": {"packed": True},
    "padding": {"padded": True},
    "soft-cap": {"softcap": 1.5},
    "alibi, grouped, packed": {"positions": Alibi(), "kv": 4, "packed": True},
    "rope, window": {"positions": Rope(trained=64), "pattern": ("sliding_window", {"window": 70})},
    "two branches": {"positions": Rope(trained=64), "pattern": ("lm_infinite", {"window": 70, "ceiling": 70.0})},
}


def _side(packed: bool, padded: bool) -> Tokens:
    index = np.broadcast_to(np.arange(T), (B, T)).copy()
    segments = None
    if packed:
        cuts = np.random.default_rng(1).integers(1, T, (B, 1))
        segments = jnp.asarray(index >= cuts, jnp.int32)
        index = np.where(index >= cuts, index - cuts, index)
    if padded:
        index[:, -7:] = -1
    own = jnp.asarray(index, jnp.int32)
    return Tokens(own, own.astype(jnp.float32), segments, contiguous=not packed and not padded)


@pytest.mark.parametrize("name", CASES)
def test_auto_equals_dense_forward_and_gradient(name: str) -> None:
    case = CASES[name]
    rng, kv = np.random.default_rng(0), case.get("kv", H)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (H, kv, kv))
    side = _side(case.get("packed", False), case.get("padded", False))
    plug, settings = case.get("pattern", ("causal", {}))
    pattern, positions = TABLE[plug](**settings), case.get("positions", NoPE())

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        def loss(args: Any, backend: str) -> Any:
            q, k, v = args
            ctx = Context(q, side, (Keys(k, v, side),), positions, jnp.asarray(float(T)), D**-0.5)
            out, lse = attend(ctx, pattern.branches(ctx), softcap=case.get("softcap"), backend=backend)
            return jnp.sin(3 * out).sum() + 1e-30 * lse.sum(), out

        return [jax.value_and_grad(loss, has_aux=True)((q, k, v), b) for b in ("dense", "auto")]

    ((_, want), g_want), ((_, got), g_got) = both(q, k, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    for a, b in zip(g_got, g_want, strict=True):
        assert rms_ratio(a, b) <= 5e-6


def _largest(B: int, T: int, **settings: Any) -> int:
    """Elements of the largest array in the gradient's program."""
    x = jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)

    def loss(q: Any, k: Any, v: Any) -> Any:
        ctx = Context(q, side, (Keys(k, v, side),), NoPE(), jnp.asarray(float(T)), 1.0)
        return attend(ctx, TABLE["causal"]().branches(ctx), **settings)[0].sum()

    def sizes(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))
            for value in equation.params.values():
                for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        yield from sizes(getattr(inner, "jaxpr", inner))

    return max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr))


def test_auto_takes_tiles_for_a_batch_and_one_product_for_a_row() -> None:
    square = B * H * 256 * 256
    assert _largest(B, 256) < square <= _largest(B, 256, backend="dense")
    assert _largest(1, 256) == H * 256 * 256  # one tile would hold it all: dense
    assert _largest(B, 256, block_q=128, block_k=128) == B * H * 128 * 128  # what the config says is what runs
    assert _largest(B, 256, block_q=256) == square


@pytest.mark.parametrize("change", [{}, {"scan_layers": False, "remat": True}], ids=["scan", "unrolled, remat"])
def test_a_training_gradient_does_not_depend_on_the_backend(change: dict[str, Any]) -> None:
    """The objective over a batch of packed rows, through the whole model: `auto`, `dense`, unstacked parameters."""
    cfg = model_config({"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "d_ff": 48})
    cfg = merge(cfg, change, "model")
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 61, (B, 101))
    segments = np.arange(100) >= rng.integers(1, 100, (B, 1))
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.asarray(rng.random((B, 100)), jnp.float32),
        "segments": jnp.asarray(segments, jnp.int32),
    }
    params = jax.tree.map(lambda x: 8 * x if x.ndim >= 3 else x, params_lib.init(cfg, jax.random.key(0)))

    def run(cfg: Any, params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return Causal(chunk=256).loss(Forward(DecoderModel(cfg), params), batch).loss

        return jax.jit(jax.value_and_grad(loss))(params)

    want, g_want = run(merge(cfg, {"mixer": {"backend": "dense"}}, "model"), params)
    got, g_got = run(cfg, params)
    flat, g_flat = run(cfg, params_lib.unstack(params))
    np.testing.assert_allclose([got, flat], want, rtol=1e-6)
    for grads, wanted in ((g_got, g_want), (g_flat, params_lib.unstack(g_want))):
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
            assert rms_ratio(a, b) <= 1e-5
