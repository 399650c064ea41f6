"""A row's answer is its own: not of its neighbours, of the padding, of what it is packed with, nor of the pieces it is
read in. What could break this are methods that look at where a text ends."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig, merge, model_config
from lm.decoding import Generator, Sampling
from lm.decoding import generator as sampler
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

V = 31
BASE = model_config(
    {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_positions": 12}
)
LONG = {"name": "longrope", "short_factor": (1.0, 1.5), "long_factor": (4.0, 9.0), "original": 24, "factor": 4.0}
FAR = {"name": "lm_infinite", "window": 6, "sinks": 2, "ceiling": 6.0, "top_k": 2, "top_k_from_layer": 0}
MODELS: dict[str, dict[str, Any]] = {
    "dynamic": {"positions": {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}}},
    "longrope": {"positions": {"name": "rope", "scaling": LONG}},
    "dynamic, sliding window": {
        "positions": {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}},
        "pattern": {"name": "sliding_window", "window": 9},
    },
    "far tokens of the last query": {"pattern": {**FAR, "top_k_queries": 1}},
    "far tokens of three queries": {"pattern": {**FAR, "top_k_queries": 3}},
}
LENGTHS = (5, 20, 33)
TEXTS = [np.random.default_rng(n).integers(0, V, n).tolist() for n in LENGTHS]
GREEDY = Sampling(temperature=0.0)


def config(name: str, backend: str = "dense") -> ModelConfig:
    mixer = {"mixer": {"name": "softmax", "backend": backend, "block_q": 8, "block_k": 8}}
    return merge(merge(BASE, MODELS[name], "model"), mixer, "model")


@functools.cache
def weights(cfg: ModelConfig) -> Any:
    return jax.tree.map(lambda x: 8 * x if x.ndim >= 2 else x, params_lib.init(cfg, jax.random.key(0)))


def logits(cfg: ModelConfig, inputs: Inputs) -> Any:
    return np.asarray(jax.jit(lambda p, x: DecoderModel(cfg).apply(p, x).logits_BTV)(weights(cfg), inputs))


@functools.cache
def alone(name: str) -> list[Any]:
    return [logits(config(name), Inputs(jnp.asarray([ids])))[0] for ids in TEXTS]


def test_the_end_of_a_text_matters() -> None:
    """What the other tests compare would differ if a longer neighbour's end were taken."""
    for name in MODELS:
        short = logits(config(name), Inputs(jnp.asarray([TEXTS[2][:20]])))[0]
        assert np.abs(alone(name)[2][:20] - short).max() > 1e-2, name


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "dense") for name in MODELS), ("dynamic", "blocked"), ("far tokens of three queries", "blocked")],
)
def test_neighbours_padding_and_packing(name: str, backend: str) -> None:
    cfg, width = config(name, backend), 36
    tokens, index = np.zeros((6, width), np.int32), np.full((6, width), -1, np.int32)
    for i, ids in enumerate(TEXTS):
        right, left = slice(len(ids)), slice(width - len(ids), width)
        tokens[i, right] = tokens[3 + i, left] = ids
        index[i, right] = index[3 + i, left] = np.arange(len(ids))
    padded = logits(cfg, Inputs(jnp.asarray(tokens), index_BT=jnp.asarray(index)))
    segments = jnp.asarray([np.repeat([4, 9, 2], LENGTHS)])
    packed = logits(cfg, Inputs(jnp.asarray([[*itertools.chain(*TEXTS)]]), segments_BT=segments))[0]
    at = 0
    for i, want in enumerate(alone(name)):
        n = len(want)
        np.testing.assert_allclose(padded[i, :n], want, atol=2e-4, err_msg="padding on the right")
        np.testing.assert_allclose(padded[3 + i, width - n :], want, atol=2e-4, err_msg="padding on the left")
        np.testing.assert_allclose(packed[at : at + n], want, atol=2e-4, err_msg="packed")
        at += n


@pytest.mark.parametrize("name", ["dynamic", "longrope", "far tokens of three queries"])
def test_pieces_and_neighbours_of_a_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token is that of the prompt alone in one pass, and the others are those of the prompt alone in one
    piece."""
    model = DecoderModel(config(name))

    def generated(texts: list[list[int]], first: int, piece: int) -> list[Any]:
        monkeypatch.setattr(sampler, "FIRST", first)
        monkeypatch.setattr(sampler, "PIECE", piece)
        made = Generator(model, weights(model.cfg))(texts, GREEDY, max_new_tokens=3)
        return [row[0] for row in made]

    together = generated(TEXTS, 16, 8)
    for ids, made, read in zip(TEXTS, together, alone(name), strict=True):
        last = jax.nn.log_softmax(read[-1])
        assert int(last.argmax()) == made.tokens[0]
        np.testing.assert_allclose(float(last[made.tokens[0]]), made.logprobs[0], atol=2e-4)
        (whole,) = generated([ids], 64, 64)
        assert whole.tokens == made.tokens
        np.testing.assert_allclose(whole.logprobs, made.logprobs, atol=2e-4)
