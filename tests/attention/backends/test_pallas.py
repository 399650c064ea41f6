"""The backend `pallas`, interpreted: equal to `dense` through the whole model, on 8 devices too; what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases.model import BASE, TOKENS, T, apply, forward, gradient, logits, parameters, rms_ratio

from kernels_pallas import common
from kernels_pallas.check import COMPILER_ALONE
from lm import caches
from lm.attention.attend import attend
from lm.attention.branches import NEG, Branch, Context, Keys, Tokens
from lm.attention.masks import Causal, Sinks, Window
from lm.config import merge, model_config
from lm.errors import UserError
from lm.patterns import TABLE
from lm.patterns.base import Pattern
from lm.positions.base import Positions
from lm.positions.rope import Rope
from lm.sharding.layout import Layout, using

PLUGS: dict[str, dict[str, Any]] = {
    "lm_infinite": {"pattern": {"name": "lm_infinite", "window": 9, "sinks": 2, "ceiling": 9.0}},
    "streaming, alibi, soft-cap": {
        "pattern": {"name": "streaming", "window": 7, "sinks": 2},
        "positions": {"name": "alibi"},
        "mixer": {"softcap": 4.0},
    },
}


def _on(name: str, changes: dict[str, Any]) -> Any:
    return merge(merge(BASE, changes, "model"), {"mixer": {"backend": name}}, "model")


@pytest.mark.parametrize("name", PLUGS)
def test_equals_dense_through_the_model(name: str) -> None:
    """Logits and gradients of every parameter. Two branches each, grouped queries, a ragged length."""
    dense, kernel = (_on(backend, PLUGS[name]) for backend in ("dense", "pallas"))
    params = parameters(BASE)
    (_, want), g_want = gradient(dense)(params)
    (_, got), g_got = gradient(kernel)(params)
    assert rms_ratio(got, want) <= 1e-5
    for a, b in zip(jax.tree.leaves(g_got), jax.tree.leaves(g_want), strict=True):
        assert rms_ratio(a, b) <= 2e-5


def test_packed_rows_and_a_cache() -> None:
    """Two documents in a row; and a prompt in a cache followed by single tokens."""
    cfg, kernel = (_on(backend, PLUGS["lm_infinite"]) for backend in ("dense", "pallas"))
    index = np.r_[0:19, 0 : T - 19][None].repeat(2, 0).astype(np.int32)
    packed = {
        "tokens_BT": TOKENS,
        "index_BT": index,
        "segments_BT": (np.arange(T) >= 19)[None].repeat(2, 0).astype(np.int32),
    }
    params = parameters(BASE)
    assert rms_ratio(logits(kernel, params, **packed), logits(cfg, params, **packed)) <= 1e-5
    want, cache, at, got = logits(cfg, params, tokens_BT=TOKENS), caches.init(kernel, 2, T), 0, []
    for n in (T - 2, 1, 1):
        part = jnp.broadcast_to(at + jnp.arange(n, dtype=jnp.int32), (2, n))
        out = forward(kernel)(params, tokens_BT=jnp.asarray(TOKENS[:, at : at + n]), index_BT=part, cache=cache)
        cache, at = out.cache, at + n
        got.append(np.asarray(out.logits_BTV))
    assert rms_ratio(np.concatenate(got, 1), want) <= 1e-5


def _two_ranges(backend: str, q: Any, k: Any, v: Any) -> Any:
    """Near keys at their own distances, far ones at halved positions (arXiv 2401.01325), and a first token apart."""
    T = q.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    own = index.astype(jnp.float32)
    side = Tokens(index, own, contiguous=True)
    ctx = Context(q, side, (Keys(k, v, side),), Rope(trained=64), jnp.float32(T), 0.3)
    far = Causal() & ~Window(12)
    branches = (
        Branch(Causal() & Window(12)),
        Branch(far & ~Sinks(1), q_positions=own // 2 + 6, k_positions=own // 2),
        Branch(far & Sinks(1), q_positions=12.0, k_positions=0.0),
    )
    return attend(ctx, branches, softcap=9.0, backend=backend, block_q=16, block_k=8)


def test_two_ranges_of_positions_equal_the_dense_union() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 45, n, 8)), jnp.float32) for n in (4, 2, 2))

    def loss(args: Any, backend: str) -> Any:
        out, lse = _two_ranges(backend, *args)
        return jnp.sin(3 * out).sum() + jnp.cos(lse).sum(), (out, lse)

    want, got = (
        jax.jit(jax.value_and_grad(lambda a, b=b: loss(a, b), has_aux=True))((q, k, v)) for b in ("dense", "pallas")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_ratio(a, b) <= 1e-5


def test_training_matches_dense_step_by_step() -> None:
    """Ten steps of Adam on a small model: the losses of the kernel are those of `dense` to rounding."""
    cfg = model_config({"vocab_size": 17, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24})
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 17, (2, 25)))
    update = optax.adam(1e-2)

    def train(backend: str) -> tuple[list[float], Any]:
        chosen = merge(cfg, {"mixer": {"backend": backend, "block_q": 16, "block_k": 8}}, "model")

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                out = apply(chosen, params, tokens_BT=tokens[:, :-1]).logits_BTV
                return optax.softmax_cross_entropy_with_integer_labels(out, tokens[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            change, state = update.update(grads, state)
            return optax.apply_updates(params, change), state, value

        params = parameters(cfg)
        state, losses = update.init(params), []
        for _ in range(10):
            params, state, value = step(params, state)
            losses.append(float(value))
        return losses, params

    (want, params), (got, kernel) = train("dense"), train("pallas")
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert rms_ratio(*(np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in (kernel, params))) <= 1e-3


def test_rows_spread_over_8_devices() -> None:
    """Under a mesh the same line runs in `shard_map`, and gives what one device gives."""
    cfg = _on("pallas", PLUGS["lm_infinite"])
    mesh = Layout().mesh()
    tokens = np.random.default_rng(0).integers(0, 61, (8, 20))
    params = parameters(BASE)

    def loss(params: Any, tokens: Any) -> jax.Array:
        return jnp.sin(5 * apply(cfg, params, tokens_BT=tokens).logits_BTV).mean()

    want = jax.jit(jax.value_and_grad(loss))(params, jnp.asarray(tokens))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with using(Layout(), mesh):
        program = jax.jit(jax.value_and_grad(loss)).trace(params, jax.device_put(jnp.asarray(tokens), rows))
        assert "shard_map" in str(program.jaxpr)
        got = program.lower().compile()(params, jax.device_put(jnp.asarray(tokens), rows))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_ratio(a, b) <= 1e-5


def test_compiled_for_the_chips_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient for four v5e, lowered without one: 'auto' takes the kernels, with the chip's block sizes."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs (extra 'aot') is not installed")
    from jax.experimental import topologies

    for name, value in COMPILER_ALONE.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(common.CHIPS["v5e"].topology, "tpu").devices
    mesh = Layout().mesh(devices)
    rows, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), parameters(BASE))
    tokens = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=rows)

    chosen = merge(_on("auto", PLUGS["lm_infinite"]), {"mixer": {"block_q": None, "block_k": None}}, "model")

    def loss(params: Any, tokens: Any) -> jax.Array:
        return apply(chosen, params, tokens_BT=tokens).logits_BTV.mean()

    with using(Layout(), mesh):
        program = jax.jit(jax.grad(loss)).trace(params, tokens)
        text = program.lower().as_text()
    assert text.count("@tpu_custom_call") == 2 * 3  # branches; forward, dQ, dK with dV; layers are one loop
    assert common.blocks("flash", "v5e")["block_k"] == 1024 != common.blocks("flash")["block_k"]
    assert "[1024,8]" in str(program.jaxpr) and "[512,8]" in str(program.jaxpr)  # blocks of keys, of queries


@pytest.mark.parametrize("pattern", [{"name": "lm_infinite", "top_k": 2}], ids=["top_k"])
def test_patterns_that_list_keys_are_refused_by_name(pattern: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^model\.mixer\.backend: 'pallas' .* lists keys at run time; valid: auto"):
        merge(BASE, {"mixer": {"backend": "pallas"}, "pattern": pattern}, "model")


def test_a_bias_the_kernel_does_not_know_is_refused() -> None:
    class Square(Positions):
        def bias(self, q: Any, k: Any, n: int) -> Any:
            return -((q[..., None, :, None] - k[..., None, None, :]) ** 2)

    index = jnp.arange(9, dtype=jnp.int32)[None]
    side, x = Tokens(index, index.astype(jnp.float32), contiguous=True), jnp.ones((1, 9, 2, 8))
    ctx = Context(x, side, (Keys(x, x, side),), Square(), jnp.float32(9), 1.0)
    with pytest.raises(UserError, match=r"Square is not; valid: auto"):
        attend(ctx, (Branch(Causal()),), backend="pallas")


def test_one_convention_for_rows_without_keys() -> None:
    assert common.NEG == NEG
    assert {name for name, plug in TABLE.items() if plug.lists_keys is not Pattern.lists_keys} == {"lm_infinite"}
