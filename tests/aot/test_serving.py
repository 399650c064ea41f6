"""Generation over several devices: the same tokens, caches where the rules say; and certificates of its programs."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import caches
from lm.aot import program, serving
from lm.aot.certificate import bytes_on_device
from lm.aot.hlo import collectives
from lm.config import ModelConfig, model_config
from lm.decoding.generator import Settings, initial_state, one_token, prefill
from lm.decoding.placement import ROOM, Placement
from lm.decoding.sampling import Sampling
from lm.errors import UserError
from lm.model import params
from lm.model.language_model import DecoderModel
from lm.sharding.layout import Layout
from lm.train import flops

SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_positions": 64}
NEAR = {"name": "lm_infinite", "window": 16, "sinks": 2, "ceiling": 16.0}
LISTED = {"name": "longheads", "chunk": 4, "attention_length": 16}
BLOCKED = {"name": "softmax", "backend": "blocked"}


def model(pattern: Any = "causal") -> ModelConfig:
    return model_config({**SIZES, "pattern": pattern})


def test_cut_over_devices_the_tokens_are_the_same() -> None:
    """Prompt and three greedy tokens on data 4 x tensor 2, as lowered for certificates, against one device; a layer for
    each kind of cache."""
    layers = ({"layers": "1", "pattern": NEAR}, {"layers": "2", "pattern": LISTED})
    sizes = {**SIZES, "n_layers": 3, "layer_overrides": layers, "mixer": BLOCKED}
    cfg, B, T = model_config(sizes), 4, 24
    weights = params.unstack(params.init(cfg, jax.random.key(0)))
    place = Placement(cfg, Layout(data=4, tensor=2), B, 64)
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, cfg.vocab_size)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    keys = jax.random.split(jax.random.key(2), B)
    settings = Settings(DecoderModel(cfg), Sampling(temperature=0.0), ())

    read, step = place.read(T, fresh=True).compile(), place.decode(settings.sampling).compile()
    # Two sums a layer, none per tile of keys that are listed by block.
    sums = [c for c in collectives(program.read(read.as_text()), 8) if c.kind == "all-reduce"]
    assert sum(c.times for c in sums) <= 3 * cfg.n_layers
    put = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), weights, place.params)
    hidden, cache = read(put, tokens, index, caches.init(cfg, B, 64))
    lengths = jnp.full(B, T, jnp.int32)
    state = dataclasses.replace(initial_state(settings, hidden, cache, keys, ROOM), index_B=lengths)
    expected_hidden, kept = prefill(DecoderModel(cfg), weights, tokens, index, caches.init(cfg, B, 64))
    np.testing.assert_allclose(hidden, expected_hidden, rtol=2e-5, atol=2e-5)
    alone = dataclasses.replace(initial_state(settings, expected_hidden, kept, keys, ROOM), index_B=lengths)
    once = jax.jit(lambda p, s: one_token(settings, p, s))
    for _ in range(3):
        state, alone = step(put, state), once(weights, alone)
    np.testing.assert_array_equal(state.tokens_BR[:, :3], alone.tokens_BR[:, :3])
    assert len(set(np.asarray(state.tokens_BR[:, :3]).ravel().tolist())) > 1
    keys_ = next(x for path, x in jax.tree_util.tree_leaves_with_path(state.cache) if x.ndim == 4)
    assert keys_.sharding.shard_shape(keys_.shape)[0] == 1  # one row, and half of the heads
    assert np.prod(keys_.sharding.shard_shape(keys_.shape)) * 8 == keys_.size


def test_what_a_device_holds() -> None:
    """A cache of 64 tokens for 2 rows: over rows, heads and slots."""
    cfg = model()
    place = Placement(cfg, Layout(data=2, tensor=2, sequence=2), 2, 64)
    layers, rows, slots, heads, width = 2, 1, 32, 1, 8
    keys_and_values = layers * rows * slots * heads * width * 2 * 4
    index_and_positions, used = layers * rows * slots * 2 * 4, layers * 4
    assert bytes_on_device(place.cache) == keys_and_values + index_and_positions + used


def test_flops_of_the_forward_pass() -> None:
    """Against a count by hand: matrices, and the keys that each query may see."""
    cfg = model()
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    head = 32 * 64
    assert flops.weights(cfg) == (matrices, head)
    seen = sum(range(11, 16))
    assert flops.forward(cfg, 10, 5) == 2 * 5 * (matrices + head) + 2 * 4 * 32 * seen
    near = model(NEAR)
    assert flops.forward(near, 10, 20, head=False) == 2 * 20 * matrices + 2 * 4 * 32 * sum(
        min(t, 18) for t in range(11, 31)
    )


def test_pieces_of_a_prompt() -> None:
    assert serving.cut(100) == [(100, 1, True)]
    assert serving.cut(32768) == [(4096, 1, True), (256, 112, False)]


def test_joined_pieces_add_up() -> None:
    """A program run once and one run ten times: sums by runs, and time where each is slowest by itself."""

    def piece(runs: int, compute: float, hbm: float, peak: float) -> dict[str, Any]:
        seconds = {"compute": compute, "hbm": hbm, "ici": 0.0}
        return {
            "runs": runs,
            "tokens": 8,
            "fits": True,
            "memory": {"peak": peak},
            "largest_temporaries": [],
            "seconds_to_compile": 1.0,
            "flops": {"analytic": 10.0, "compiled": 20.0, "kernels": 0.0},
            "bytes": 7.0,
            "not_counted": [],
            "loops_of_unknown_length": 0,
            "collectives": {"all-reduce": {"sites": 2, "runs": 3, "bytes": 5.0}},
            "seconds": seconds,
            "mfu_ceiling": 0.5,
        }

    one = serving.joined([piece(1, 2.0, 1.0, 5.0), piece(10, 0.1, 0.3, 9.0)])
    assert one["least_seconds"] == pytest.approx(2.0 + 3.0) and one["seconds"]["compute"] == pytest.approx(3.0)
    assert one["memory"]["peak"] == 9.0 and one["bytes"] == 77.0 and one["flops"]["ratio"] == 2.0
    assert one["collectives"]["all-reduce"] == {"sites": 4, "runs": 33, "bytes": 55.0}
    assert one["bound"] == "hbm" and one["mfu_ceiling"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("layout", "batch", "said"),
    [
        ({"data": 8}, 3, "--batch: 3 rows are not divisible by 8 devices"),
        ({"data": 2, "tensor": 4}, 2, "does not divide by 4"),
        ({"data": 4, "stage": 2}, 4, "--mesh: stages only train"),
        ({"data": 1, "sequence": 8}, 1, "the cache's array"),
    ],
)
def test_what_does_not_divide(layout: dict[str, int], batch: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Placement(model(), Layout(**layout), batch, 60)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=[pytest.mark.nightly] if i else []) for i, s in enumerate(serving.STEPS)]
)
def test_certificates_by_the_tpu_compiler(step: str) -> None:
    cfg = model_config({**SIZES, "d_model": 128, "n_heads": 4, "n_kv_heads": 4, "dtype": "bfloat16"})
    one = serving.certify(cfg, serving.Serve(batch=2, length=256), "v5e:2x2", step)
    assert one["fits"] and one["step"] == step and one["mesh"]["tensor"] == 4
    assert one["memory"]["arguments"] >= one["state"]["parameters"] + one["state"]["cache"]
    assert "all-reduce" in one["collectives"] and not one["not_counted"]
    assert one["tokens_per_second"] * one["least_seconds"] == pytest.approx(2 if step == "decode" else 512)
    # Reading computes both halves of a causal mask in one tile; decoding nothing that the formula has not.
    assert 0.9 < one["flops"]["ratio"] < (1.1 if step == "decode" else 1.6)
