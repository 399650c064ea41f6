"""What is drawn: against transformers' processors, closed forms, and by chi-square."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.drafter_case import DrafterCase
from cases.table_model import LENGTH, TableModel

from lm.decoding.sampling import NEG, Sampling, draw, shape
from lm.errors import UserError

V = 40
LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 2.5, (6, V)), jnp.float32)
NONE = (jnp.zeros((6, 1), bool), jnp.zeros((6, 1), jnp.int32))


def transformers() -> Any:
    """Its logits processors, which are PyTorch code."""
    pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    return pytest.importorskip("transformers")


def theirs(processor: Any, logits: Any = LOGITS, ids: Any = None) -> np.ndarray:
    import torch

    ids = torch.zeros((len(logits), 0), dtype=torch.long) if ids is None else torch.tensor(ids)
    return np.asarray(processor(ids, torch.tensor(np.asarray(logits))).numpy())


def same(ours: Any, want: np.ndarray) -> None:
    kept = np.isfinite(want)
    np.testing.assert_array_equal(np.asarray(ours) > NEG / 2, kept)
    np.testing.assert_allclose(np.asarray(ours)[kept], want[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "name", "args"),
    [
        ({"temperature": 0.7}, "TemperatureLogitsWarper", (0.7,)),
        ({"top_k": 5}, "TopKLogitsWarper", (5,)),
        ({"top_k": 99}, "TopKLogitsWarper", (99,)),
        ({"top_p": 0.8}, "TopPLogitsWarper", (0.8,)),
        ({"top_p": 0.01}, "TopPLogitsWarper", (0.01,)),
        ({"min_p": 0.1}, "MinPLogitsWarper", (0.1,)),
        ({"typical_p": 0.6}, "TypicalLogitsWarper", (0.6,)),
    ],
)
def test_truncations_are_those_of_transformers(settings: dict[str, Any], name: str, args: tuple[Any, ...]) -> None:
    want = theirs(getattr(transformers(), name)(*args))
    same(shape(LOGITS, Sampling(**settings), *NONE), want)


def test_they_work_one_after_the_other_as_in_transformers() -> None:
    t = transformers()
    want = LOGITS
    for p in (
        t.TemperatureLogitsWarper(1.3),
        t.TopKLogitsWarper(12),
        t.TopPLogitsWarper(0.9),
        t.MinPLogitsWarper(0.05),
    ):
        want = theirs(p, want)
    same(shape(LOGITS, Sampling(1.3, 12, 0.9, 0.05), *NONE), np.asarray(want))


def test_repetition_penalty_is_that_of_transformers() -> None:
    t = transformers()
    ids = np.random.default_rng(1).integers(0, V, (6, 9))
    prompt, made = ids[:, :5], ids[:, 5:]
    in_prompt = np.zeros((6, V), bool)
    counts = np.zeros((6, V), np.int32)
    for b in range(6):
        in_prompt[b, prompt[b]] = True
        np.add.at(counts[b], made[b], 1)
    want = theirs(t.RepetitionPenaltyLogitsProcessor(1.7), ids=ids)
    ours = shape(LOGITS, Sampling(repetition_penalty=1.7), jnp.asarray(in_prompt), jnp.asarray(counts))
    same(ours, want)


def test_presence_and_frequency_count_the_answer_only() -> None:
    made = jnp.zeros((6, V), jnp.int32).at[:, 3].set(2).at[:, 7].set(1)
    prompt = jnp.ones((6, V), bool)
    out = shape(LOGITS, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, made) - LOGITS
    want = np.zeros((6, V))
    want[:, 3], want[:, 7] = -1.0, -0.75
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_bias_moves_single_tokens() -> None:
    out = shape(LOGITS, Sampling(temperature=0, bias=((4, 100.0), (5, -3.0))), *NONE)
    assert (draw(out, Sampling(temperature=0), jax.random.split(jax.random.key(0), 6)) == 4).all()
    np.testing.assert_allclose((out - LOGITS)[:, 5], -3.0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"typical_p": 0.5}, {"bias": ((2, 1.5),)}],
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    """Chi-square against the softmax of the shaped logits, at a fixed seed."""
    stats = pytest.importorskip("scipy.stats")
    sampling, n = Sampling(**settings), 20000
    logits = jnp.asarray(np.random.default_rng(5).normal(0, 1.0, (1, 12)), jnp.float32)
    shaped = shape(logits, sampling, jnp.zeros((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    tokens = draw(jnp.repeat(shaped, n, 0), sampling, jax.random.split(jax.random.key(3), n))
    p = np.asarray(jax.nn.softmax(shaped[0]), np.float64)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[p < 1e-12].sum() == 0
    kept = p > 1e-12
    assert stats.chisquare(counts[kept], n * p[kept] / p[kept].sum()).pvalue > 1e-3
    if kept.sum() > 1:  # the test can fail: another distribution is refused
        other = np.roll(p[kept], 1)
        assert stats.chisquare(counts[kept], n * other / other.sum()).pvalue < 1e-3


def test_a_row_does_not_know_its_neighbours() -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    sampling = Sampling(top_p=0.95)
    whole = draw(shape(LOGITS, sampling, *NONE), sampling, keys)
    for b in range(6):
        alone = shape(LOGITS[b : b + 1], sampling, NONE[0][:1], NONE[1][:1])
        assert int(draw(alone, sampling, keys[b : b + 1])[0]) == int(whole[b])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature: must be 0 (greedy) or more"),
        ({"top_k": -1}, "top_k: must be 0 (off) or more"),
        ({"top_p": 0.0}, "top_p: must lie in (0, 1]"),
        ({"typical_p": 1.5}, "typical_p: must lie in (0, 1]"),
        ({"min_p": 1.0}, "min_p: must lie in [0, 1)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be positive"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as e:
        Sampling(**settings)
    assert words in str(e.value)


class TestPlainSampling(DrafterCase):
    """A token at a time, each by its own key."""

    def draw(self, target: TableModel, drafter: TableModel, last: int, n: int, seed: int) -> tuple[np.ndarray, float]:
        def one(token_B: Any, keys_B: Any) -> tuple[Any, Any]:
            logits_BV = jnp.asarray(target.logits_VV, jnp.float32)[token_B]
            zeros = jnp.zeros((n, 1), jnp.int32)
            new = draw(shape(logits_BV, Sampling(), zeros > 0, zeros), Sampling(), keys_B)
            return new, new

        @jax.jit
        def run(seed: Any) -> Any:
            keys = jax.random.split(jax.random.key(seed), (LENGTH, n))
            return jax.lax.scan(one, jnp.full(n, last), keys)[1].T

        return np.asarray(run(seed)), 0.0


RULES = (
    {"top_k": 2},
    {"top_p": 0.5},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"typical_p": 0.95, "top_p": 0.9, "top_k": 3},
)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_forbidden_token_stays_forbidden(rule: dict[str, Any]) -> None:
    """Under every rule of truncation the others are as if the vocabulary had no such token: many rows, also ties."""
    rng = np.random.default_rng(5)
    logits = np.concatenate([rng.normal(0, 3, (40, 7)), np.round(rng.normal(0, 1, (20, 7))), np.zeros((1, 7))])
    none = (jnp.zeros((len(logits), 1), bool), jnp.zeros((len(logits), 1), jnp.int32))
    for banned in ({0}, {6}, {1, 2, 5}, {0, 1, 2, 3, 4, 5}):
        left = [i for i in range(7) if i not in banned]
        bias = tuple((i, -np.inf) for i in sorted(banned))
        got = np.asarray(shape(jnp.asarray(logits), Sampling(**rule, bias=bias), *none))
        want = np.asarray(shape(jnp.asarray(logits[:, left]), Sampling(**rule), *none))
        assert (got[:, sorted(banned)] <= NEG / 2).all()
        np.testing.assert_array_equal(got[:, left] > NEG / 2, want > NEG / 2)
        p = jax.nn.softmax(got, -1)
        assert np.isfinite(p).all() and float(np.asarray(p)[:, sorted(banned)].max()) == 0


def test_the_instance_that_gave_a_forbidden_token() -> None:
    logits = jnp.array([[0.0, 1.0, 2.0, 9.0]])
    none = (jnp.zeros((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    got = shape(logits, Sampling(typical_p=0.5, bias=((3, -np.inf),)), *none)
    assert np.flatnonzero(np.asarray(got[0]) > NEG / 2).tolist() == [2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="bias: token 3: found"):
        Sampling(bias=((3, value),))
