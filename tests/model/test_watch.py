"""Looking inside: what a watch hands out, in every form, and what an edit does."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import model
from cases.model import BASE, Params

from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.watch import BINS, Watch

TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, BASE.vocab_size, (2, 9)))
NAMES = ("attn/q/input", "attn/k/input", "attn/v/input", "attn/o/input", "ffn/gate/input", "ffn/up/input")


@functools.cache
def params() -> Params:
    return model.parameters(BASE)


def watched(watch: Watch) -> Any:
    return jax.jit(lambda p: DecoderModel(BASE).apply(p, Inputs(TOKENS), watch=watch))(params())


@functools.cache
def plain() -> Any:
    return watched(Watch(taps=("*",)))


def test_every_linear_layer_and_the_stream() -> None:
    out = plain()
    assert len(out.taps) == 2 and set(out.taps[0]) == {*NAMES, "ffn/down/input", "stream"}
    assert out.taps[0]["attn/q/input"].shape == (2, 9, 32) and out.taps[0]["ffn/down/input"].shape == (2, 9, 48)
    want = model.logits(BASE, params(), tokens_BT=TOKENS)
    np.testing.assert_allclose(out.logits_BTV, want, rtol=0, atol=1e-5)


def test_nobody_watches() -> None:
    """Without a watch the program is the one that knows none, and nothing is handed out."""
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    texts = [
        jax.jit(lambda p, t, w=w: DecoderModel(BASE).apply(p, Inputs(t), watch=w).logits_BTV)
        .lower(params(), tokens)
        .as_text()
        for w in (Watch(), Watch(taps=("nothing/*",)), Watch(taps=("*",)))
    ]
    assert texts[0] == texts[1] == texts[2]  # what is not returned is not computed
    assert watched(Watch()).taps in ((), ({}, {}))


def test_the_last_tokens() -> None:
    out = watched(Watch(taps=("stream", "ffn/down/*"), last=3))
    for got, whole in zip(out.taps, plain().taps, strict=True):
        assert set(got) == {"stream", "ffn/down/input"}
        for name in got:
            np.testing.assert_allclose(got[name], whole[name][:, -3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [0, 4])
def test_reduced_over_tokens(last: int) -> None:
    names = ("attn/o/input", "ffn/up/input")
    found = {how: watched(Watch(taps=names, last=last, reduce=how)) for how in ("gram", "absmax", "hist")}
    for i, layer in enumerate(plain().taps):
        for name in names:
            x = np.float64(layer[name])[:, -last:]
            x = x.reshape(-1, *x.shape[2:])
            gram = np.einsum("n...i,n...j->...ij", x, x)
            np.testing.assert_allclose(found["gram"].taps[i][name], gram, rtol=1e-4, atol=1e-4 * np.abs(gram).max())
            np.testing.assert_allclose(found["absmax"].taps[i][name], np.abs(x).max(0), rtol=1e-5)
            counts = np.histogram(np.log10(np.abs(x)), bins=BINS, range=(-8, 4))[0]
            got = np.asarray(found["hist"].taps[i][name])
            assert got.sum() == counts.sum() == x.size and np.abs(got - counts).sum() <= 4  # rounding at an edge


def test_an_edit_takes_the_place() -> None:
    """Zeros into the last matrix of every feed-forward layer: the model without feed-forward layers."""
    out = watched(Watch(edits=(("ffn/down/input", jnp.zeros_like),)))
    blocks = params()["blocks"]
    silent = {**blocks, "ffn": {**blocks["ffn"], "down": jax.tree.map(jnp.zeros_like, blocks["ffn"]["down"])}}
    want = model.logits(BASE, {**params(), "blocks": silent}, tokens_BT=TOKENS)
    np.testing.assert_allclose(out.logits_BTV, want, rtol=0, atol=1e-5)
    assert np.abs(want - np.float64(plain().logits_BTV)).max() > 1e-2
