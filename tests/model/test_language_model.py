"""Sampler, objective and measures on a language model that is no decoder: a table of eight tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.drafter_case import DrafterCase
from cases.table_model import LENGTH, TableLM, TableModel, V

from lm.decoding import Generator, Sampling
from lm.errors import UserError
from lm.measures.base import Subject, score
from lm.objectives.causal import Causal
from lm.objectives.forward import Forward

TABLE = TableModel.random(0, 1.2)


class TestSampler(DrafterCase):
    """The generator draws what the model says: every text of four tokens as often as its probability."""

    N = 20_000
    PROGRAMS = 24  # the prompt and the loop, and the small operations that make the first state

    def draw(self, target: TableModel, drafter: TableModel, last: int, n: int, seed: int) -> tuple[np.ndarray, float]:
        (made,) = Generator(TableLM(), target.params)([[last]], max_new_tokens=LENGTH, seeds=[seed], samples=n)
        return np.array([text.tokens for text in made]), 0.0


def test_greedy_is_the_likeliest() -> None:
    prompts = [[3], [1, 5, 2], [7, 7, 7, 7, 0]]
    made = Generator(TableLM(), TABLE.params)(prompts, Sampling(temperature=0.0), max_new_tokens=LENGTH)
    for prompt, (answer,) in zip(prompts, made, strict=True):
        assert answer.tokens == TABLE.likeliest(prompt[-1])
        pairs = zip([prompt[-1], *answer.tokens], answer.tokens, strict=False)
        np.testing.assert_allclose(answer.logprobs, [np.log(TABLE.p_VV[a, b]) for a, b in pairs], rtol=1e-5)


def test_the_objective_and_its_gradient() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (3, 6))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": rng.random((3, 5)).astype(np.float32)}
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    grad = jax.value_and_grad(lambda p: Causal(chunk=4).loss(Forward(TableLM(), p), batch).loss)
    loss, got = grad(TABLE.params)
    want, of = 0.0, np.zeros((V, V))
    for a, b, w in zip(*(np.asarray(batch[k]).ravel() for k in ("inputs", "targets", "weights")), strict=True):
        want -= w * np.log(TABLE.p_VV[a, b])
        of[a] += w * (TABLE.p_VV[a] - np.eye(V)[b])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(got["logits_VV"], of, rtol=0, atol=1e-5)


def test_measures_read_it() -> None:
    subject = Subject(TableLM(), TABLE.params, None)
    tokens = np.random.default_rng(2).integers(0, V, 20).tolist()
    nll, best = score(subject, tokens, 12)
    pairs = list(zip(tokens[-13:-1], tokens[-12:], strict=True))
    np.testing.assert_allclose(nll, [-np.log(TABLE.p_VV[a, b]) for a, b in pairs], rtol=1e-5)
    assert best.tolist() == [bool(TABLE.logits_VV[a].argmax() == b) for a, b in pairs]
    with pytest.raises(UserError, match="TableLM is no decoder"):
        _ = subject.config
