"""Rows that differ in everything are answered in one batch as each is answered alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import merge, model_config
from lm.decoding import Generator, Piece, Row, Sampling
from lm.decoding.sampling import RowSampling, draw, shape
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

V = 31
CFG = model_config(
    {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_positions": 64}
)
WAYS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, typical_p=0.2, bias=((3, -5.0), (3, 2.0), (9, float("-inf")))),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=3),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=0.9, min_p=0.2),
    Sampling(temperature=0.8, typical_p=0.5),
    Sampling(temperature=1.0, top_k=99),
    Sampling(temperature=1.1, repetition_penalty=1.4, presence_penalty=0.3),
    Sampling(temperature=0.0, frequency_penalty=0.6, bias=((30, 1.5),)),
)


@pytest.fixture(scope="module")
def generator() -> Generator:
    tree = params_lib.init(CFG, jax.random.key(0))
    return Generator(DecoderModel(CFG), jax.tree.map(lambda x: 8 * x if x.ndim >= 2 else x, tree))


def gathered(pieces: Any, n: int) -> list[tuple[list[int], list[float], list[Any], str]]:
    out: list[Any] = [([], [], [], "") for _ in range(n)]
    for row, tokens, logprobs, top, end in pieces:
        assert not out[row][3], "a row that has ended goes on"
        out[row] = (out[row][0] + tokens, out[row][1] + logprobs, out[row][2] + top, end)
    return out


def test_a_row_is_shaped_and_drawn_as_its_own_settings_say() -> None:
    rng = np.random.default_rng(0)
    B = len(WAYS)
    logits_BV = jnp.asarray(3 * rng.normal(size=(B, V)), jnp.float32)
    in_prompt_BV, made_BV = jnp.asarray(rng.random((B, V)) < 0.3), jnp.asarray(rng.integers(0, 3, (B, V)), jnp.int32)
    rows = RowSampling.of(WAYS, V)
    keys_B = jax.random.split(jax.random.key(1), B)
    together_BV = shape(logits_BV, rows, in_prompt_BV, made_BV)
    drawn_B = draw(together_BV, rows, keys_B)
    for b, way in enumerate(WAYS):
        one = slice(b, b + 1)
        alone_1V = shape(logits_BV[one], way, in_prompt_BV[one], made_BV[one])
        np.testing.assert_allclose(together_BV[one], alone_1V, rtol=1e-6, atol=1e-6)
        assert int(drawn_B[b]) == int(draw(alone_1V, way, keys_B[one])[0])


def test_programs_depend_on_which_settings_are_used_not_on_their_values() -> None:
    def used(*ways: Sampling) -> Any:
        return jax.tree.structure(RowSampling.of(ways, V))

    assert RowSampling.of(WAYS[:1], V).used == {}
    assert used(WAYS[3], WAYS[0]) == used(Sampling(temperature=2.0, top_k=5), Sampling(temperature=0.1))
    assert used(WAYS[3]) != used(WAYS[4])


def test_rows_of_one_batch_are_answered_as_alone(generator: Generator) -> None:
    rng = np.random.default_rng(2)
    rows = [
        Row(rng.integers(0, V, length).tolist(), way, seed, new)
        for way, length, seed, new in zip(WAYS[::2], (3, 8, 1, 5, 7), (5, 6, 7, 8, 9), (9, 1, 20, 12, 17), strict=True)
    ]
    made = gathered(generator.rows(rows, stop=[11], stride=3), len(rows))
    for row, (tokens, logprobs, top, end) in zip(rows, made, strict=True):
        (alone,) = generator([row.prompt], row.sampling, max_new_tokens=row.max_new_tokens, stop=[11], seeds=[row.seed])
        assert (tokens, end, top) == (alone[0].tokens, alone[0].finish, [])
        np.testing.assert_allclose(logprobs, alone[0].logprobs, atol=2e-5)
    assert {end for *_, end in made} == {"stop", "length"}


def test_alternatives_are_the_likeliest_tokens(generator: Generator) -> None:
    """Against a reading of the whole text."""
    row = Row([3, 1, 4], Sampling(temperature=1.5), seed=3, max_new_tokens=6)
    ((tokens, logprobs, top, _),) = gathered(generator.rows([row], top=4), 1)
    read = generator.model.apply(generator.params, Inputs(jnp.asarray([[*row.prompt, *tokens]]))).logits_BTV[0, 2:-1]
    want_TV = np.asarray(jax.nn.log_softmax(read))
    for t, (token, logprob, likely) in enumerate(zip(tokens, logprobs, top, strict=True)):
        assert logprob == pytest.approx(want_TV[t, token], abs=2e-5)
        assert [i for i, _ in likely] == np.argsort(-want_TV[t])[:4].tolist()
        np.testing.assert_allclose([p for _, p in likely], -np.sort(-want_TV[t])[:4], atol=2e-5)


def test_a_row_that_nobody_wants_ends(generator: Generator) -> None:
    rows = [Row([5], WAYS[0], max_new_tokens=40), Row([6], WAYS[0], max_new_tokens=8)]
    unwanted: set[int] = set()
    seen: list[Piece] = []
    for piece in generator.rows(rows, stride=4, unwanted=unwanted):
        seen.append(piece)
        unwanted.add(0)
    assert [piece.row for piece in seen] == [0, 1, 1] and seen[-1].finish == "length"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row([], WAYS[0]), "prompt 0: is empty"),
        (Row([V], WAYS[0]), f"unknown token id {V}"),
        (Row([1], WAYS[0], max_new_tokens=0), "must be at least 1"),
        (Row([1], Sampling(bias=((V, 1.0),))), "bias: unknown token id"),
        (Row([1], WAYS[0], seed=-1), "seed: found -1"),
    ],
)
def test_mistakes(generator: Generator, row: Row, words: str) -> None:
    with pytest.raises(UserError, match=words):
        next(generator.rows([Row([1], WAYS[0], max_new_tokens=1), row]))


def test_a_cache_of_fixed_size_holds_what_fits() -> None:
    cfg = merge(CFG, {"cache": {"name": "full", "capacity": 20}}, "model")
    tree = params_lib.init(cfg, jax.random.key(0))
    small = Generator(DecoderModel(cfg), tree)
    rows = [Row([1] * 8, WAYS[0], max_new_tokens=12)]
    assert len(gathered(small.rows(rows), 1)[0][0]) == 12  # not the 16 of a power of two
    with pytest.raises(UserError, match="more than the cache of 20"):
        next(small.rows([*rows, Row([1] * 9, WAYS[0], max_new_tokens=4)]))
