"""A model under surgery, layer by layer: what comes into a layer is what the changed layers before it give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from cases import model
from cases.model import BASE

from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.model.params import unstack
from lm.surgery.calibration import Calibration
from lm.watch import Watch

TOKENS = jnp.asarray(np.random.default_rng(8).integers(0, BASE.vocab_size, (3, 10)))


def test_inputs_are_those_of_the_whole_model() -> None:
    params = model.parameters(BASE)
    whole = DecoderModel(BASE).apply(params, Inputs(TOKENS), watch=Watch(taps=("*",)))
    views = list(Calibration(TOKENS).layers(BASE, params))
    assert [view.i for view in views] == [0, 1]
    for view, want in zip(views, whole.taps, strict=True):
        got = view.inputs()
        assert set(got) == {name.removesuffix("/input") for name in want if name != "stream"}
        for name, x in got.items():
            np.testing.assert_allclose(x, want[f"{name}/input"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(view.output(), want["stream"], rtol=0, atol=1e-5)
        gram, x = view.inputs("gram")["ffn/down"], np.float64(want["ffn/down/input"]).reshape(-1, BASE.d_ff)
        np.testing.assert_allclose(gram, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())


def test_a_layer_sees_what_was_done_before_it() -> None:
    """The first layer's feed-forward is silenced on the way: the second gets what the silenced model gives, and so do
    the logits of the changed tree."""
    params, views = model.parameters(BASE), []
    for view in Calibration(TOKENS).layers(BASE, params):
        if view.i == 0:
            silent = jax.tree.map(jnp.zeros_like, view.params["ffn"]["down"])
            view.params = {**view.params, "ffn": {**view.params["ffn"], "down": silent}}
        views.append((view, view.inputs()["attn/q"]))
    tree = unstack(params)
    by_hand = {**tree, "blocks_0": {**tree["blocks_0"], "ffn": {**tree["blocks_0"]["ffn"], "down": silent}}}
    run = DecoderModel(BASE)
    want = run.apply(by_hand, Inputs(TOKENS), watch=Watch(taps=("attn/q/input",)))
    np.testing.assert_allclose(views[1][1], want.tap("attn/q/input")[1], rtol=0, atol=1e-5)
    before = run.apply(params, Inputs(TOKENS), watch=Watch(taps=("attn/q/input",)))
    assert float(jnp.abs(views[1][1] - before.tap("attn/q/input")[1]).max()) > 1e-2
    made = Calibration(TOKENS).changed(BASE, params, [view for view, _ in views])
    got = run.apply(made, Inputs(TOKENS)).logits_BTV
    np.testing.assert_array_equal(got, run.apply(by_hand, Inputs(TOKENS)).logits_BTV)
