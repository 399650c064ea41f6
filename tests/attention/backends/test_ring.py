"""Ring attention on eight devices: outputs, gradients and programs, against one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.aot.hlo import collectives
from lm.attention.attend import attend
from lm.attention.backends.ring import meetings
from lm.attention.branches import Branch, Context, Keys, Tokens
from lm.attention.masks import Causal as CausalMask
from lm.attention.masks import Full, Mask, Sinks, Window
from lm.config import build, model_config
from lm.errors import UserError
from lm.model import params
from lm.patterns.causal import Causal
from lm.patterns.lm_infinite import LMInfinite
from lm.patterns.sliding_window import SlidingWindow
from lm.positions.alibi import Alibi
from lm.positions.rope import Rope
from lm.sharding import Layout
from lm.sharding.layout import using
from lm.train import step
from lm.train.config import TrainConfig
from lm.train.placement import Placement

B, T, H, K, D = 2, 32, 4, 2, 8


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Positions as arrays: halved for queries and keys alike (E2-LLM's and Self-Extend's kind of branch)."""

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        halved = (jnp.floor(x.positions_BT / 2) for x in (ctx.queries, ctx.keys))
        near = CausalMask() & Window(5)
        return Branch(near), Branch(CausalMask() & ~Window(5), *halved)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "causal, rotary": (Causal(), Rope(), {}),
    "causal with a prefix, ALiBi, soft cap": (Causal(prefix=3), Alibi(), {"softcap": 2.0}),
    "window, ALiBi, soft cap, tiles": (
        SlidingWindow(window=10),
        Alibi(),
        {"softcap": 3.0, "backend": "blocked", "block_q": 4, "block_k": 8},
    ),
    "LM-Infinite": (LMInfinite(window=9, sinks=2, ceiling=9.0), Rope(), {}),
    "LM-Infinite, ALiBi, tiles": (
        LMInfinite(window=9, sinks=2, ceiling=9.0),
        Alibi(),
        {"backend": "blocked", "block_q": 8, "block_k": 8},
    ),
    "positions of its own": (Elsewhere(), Rope(), {}),
}
CASES |= {
    "zigzag: causal, rotary": (Causal(), Rope(), {}),
    "zigzag: window, tiles": (SlidingWindow(window=10), Rope(), {"backend": "blocked", "block_q": 4, "block_k": 4}),
    "causal, kernels": (Causal(), Rope(), {"backend": "pallas"}),
}
PACKED = ("causal, rotary", "LM-Infinite, ALiBi, tiles", "zigzag: causal, rotary")


def tokens(packed: bool) -> Tokens:
    """One document a row; or three, the second across parts and the last followed by padding."""
    if not packed:
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return Tokens(index, index.astype(jnp.float32), None, True)
    index = np.concatenate([np.arange(5), np.arange(14), np.arange(10), np.full(3, -1)]).astype(np.int32)
    segments = np.repeat([0, 1, 2, 3], [5, 14, 10, 3]).astype(np.int32)
    index, segments = (jnp.asarray(np.stack([x, x])) for x in (index, segments))
    return Tokens(index, index.astype(jnp.float32), segments)


def program(pattern: Any, positions: Any, options: dict[str, Any], packed: bool) -> Any:
    """Output, log-sum-exp and the gradients of queries, keys and values for a cotangent of both."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Any:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            known = tokens(packed)
            ctx = Context(q, known, (Keys(k, v, known),), positions, jnp.float32(T), D**-0.5)
            return attend(ctx, pattern.branches(ctx), **options)

        out, pull = jax.vjp(run, q, k, v)
        return out, pull((d_out, d_lse))

    return both


def drawn(packed: bool) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D), (B, T, H, D), (B, T, H))
    x = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    if packed:  # the log-sum-exp of a row that sees nothing is a constant
        x[4] = x[4].at[:, -3:].set(0.0)
    return x


@pytest.mark.parametrize("name", CASES)
def test_a_ring_gives_what_one_device_gives(name: str) -> None:
    packed = name in PACKED
    run, args = program(*CASES[name], packed), drawn(packed)
    want = jax.jit(run)(*args)
    layout = Layout(data=1, sequence=4, tensor=2, attention="zigzag" if name.startswith("zigzag") else "ring")
    with using(layout, layout.mesh()):
        compiled = jax.jit(lambda *a: run(*a)).lower(*args).compile()
    kinds = {c.kind for c in collectives(compiled.as_text(), 8)}
    assert "collective-permute" in kinds
    for got, expected in zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_hops_that_nobody_needs_are_not_made() -> None:
    def table(*masks: Mask) -> np.ndarray:
        return meetings(masks, 4, 8, True)[..., 0, 0]

    np.testing.assert_array_equal(table(CausalMask()), [[i >= h for i in range(4)] for h in range(4)])
    assert table(Full()).all()
    for width, hops in ((1, 1), (2, 2), (9, 2), (10, 3), (17, 3), (18, 4)):
        assert len(table(CausalMask() & Window(width))) == hops
    sinks = table(CausalMask() & (Window(4) | Sinks(2)))
    np.testing.assert_array_equal(sinks, [[h in (0, 1, i) and i >= h for i in range(4)] for h in range(4)])


@pytest.mark.parametrize("n", [2, 4, 16])
def test_a_zigzag_gives_every_device_the_same_work(n: int) -> None:
    """Pairs of pieces that a causal mask visits, hop by hop: two on every device (three of its own), where parts in
    order keep the last device busy in all hops, four pairs each, and the first in one."""
    order, zigzag = (meetings((CausalMask(),), n, 8, True, pieces).sum((2, 3)) for pieces in (1, 2))
    assert order.sum(0).tolist() == list(range(1, n + 1)) and order.max(1).sum() == n
    np.testing.assert_array_equal(zigzag, [[3] * n] + [[2] * n] * (n - 1))
    assert zigzag.max(1).sum() == 2 * n + 1 < 4 * order.max(1).sum()


def settings(**mesh: Any) -> TrainConfig:
    return build(TrainConfig, {"batch": 4, "data": {"seq_len": 32}, "mesh": mesh}, "train")


def test_a_step_sends_parts_of_keys_and_gathers_none() -> None:
    """No device ever holds the tokens of a whole row, in any layer or the loss: gradients and sums are all that the
    devices add up. `gather` is the control."""
    sizes = {"vocab_size": 32, "d_model": 24, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
    cfg = model_config({**sizes, "max_positions": 32})
    texts = {}
    for way in ("ring", "gather"):
        place = Placement(cfg, settings(data=2, sequence=4, attention=way))
        state = jax.eval_shape(lambda p=place: step.initial(cfg, p.train, params.init(cfg, jax.random.key(0))))
        batch = {k: jax.ShapeDtypeStruct((4, 32), t) for k, t in (("inputs", "int32"), ("targets", "int32"))}
        batch["weights"] = jax.ShapeDtypeStruct((4, 32), "float32")
        texts[way] = place.compile(state, batch).as_text()
    whole, part = "f32[2,32,2,6]", "f32[2,8,2,6]"  # two of four rows, a quarter of the tokens
    assert {c.kind for c in collectives(texts["ring"], 8)} == {"collective-permute", "all-reduce"}
    assert any("collective-permute(" in line and part in line for line in texts["ring"].splitlines())
    assert whole not in texts["ring"]
    assert "all-gather" in texts["gather"] and whole in texts["gather"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"name": "lm_infinite", "window": 8, "top_k": 2, "top_k_from_layer": 0}, "its keys are listed one by one"),
        ({"name": "longheads", "chunk": 4, "attention_length": 16}, "its keys are listed by block"),
    ],
)
def test_patterns_that_no_ring_can_do_are_refused_with_the_reason(pattern: dict[str, Any], said: str) -> None:
    cfg = model_config(
        {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_positions": 32}
        | {"pattern": pattern}
    )
    with pytest.raises(UserError, match=rf"train\.mesh\.attention: ring is impossible .*{said}.*; valid: gather"):
        Placement(cfg, settings(data=2, sequence=4))
    Placement(cfg, settings(data=2, sequence=4, attention="gather"))


def test_ways_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"train\.mesh\.attention: unknown name 'rings' \(did you mean 'ring'\?\)"):
        settings(attention="rings")
