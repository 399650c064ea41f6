"""Scores of a text are the log-softmax of the decoder's logits, whatever else is read with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import model_config
from lm.decoding.scoring import score
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

V = 23
MODEL = DecoderModel(model_config({"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24}))
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8]]


def test_scores_are_the_log_softmax() -> None:
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params_lib.init(MODEL.cfg, jax.random.key(0)))
    made = score(MODEL, params, ROWS, batch=4, top=3)
    width = max(map(len, ROWS))
    whole = jnp.asarray([row + [0] * (width - len(row)) for row in ROWS])
    want_BTV = np.asarray(jax.nn.log_softmax(MODEL.apply(params, Inputs(whole)).logits_BTV))
    for b, row in enumerate(ROWS):
        for t, token in enumerate(row[1:]):
            np.testing.assert_allclose(made.logprobs_BT[b, t], want_BTV[b, t, token], atol=2e-5)
            assert made.greedy_BT[b, t] == (want_BTV[b, t].argmax() == token)
            assert made.ids_BTk[b, t].tolist() == np.argsort(-want_BTV[b, t])[:3].tolist()
            np.testing.assert_allclose(made.likely_BTk[b, t], -np.sort(-want_BTV[b, t])[:3], atol=2e-5)
