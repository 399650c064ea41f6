"""The loop: equal to reading the whole text again for every token, whatever the cache, the batch and the pieces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig, merge, model_config
from lm.decoding import Generator, Sampling
from lm.decoding import generator as sampler
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

V = 31
BASE = model_config(
    {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_positions": 64}
)
INT8 = {"cache": {"quantize": "int8"}}
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4]]
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"pattern": {"name": "sliding_window", "window": 4}},
    "streaming": {"pattern": {"name": "streaming", "window": 5, "sinks": 2}},
    "lm_infinite": {"pattern": {"name": "lm_infinite", "window": 5, "sinks": 2, "ceiling": 5.0}},
    # Beyond the trained length its frequencies follow the text's, so that earlier tokens were read with others.
    "dynamic": {"positions": {"name": "rope", "trained": 64, "scaling": {"name": "dynamic", "factor": 2.0}}},
    "yarn": {"positions": {"name": "rope", "trained": 8, "scaling": {"name": "yarn", "factor": 4.0}}},
    "alibi": {"positions": {"name": "alibi"}},
    "learned": {"positions": {"name": "learned", "size": 64}},
}


def weights(cfg: ModelConfig) -> Any:
    tree = params_lib.init(cfg, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim >= 2 else x, tree)


def reread(cfg: ModelConfig, tree: Any, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy by reading everything from the start for each token; one compiled length."""
    run = jax.jit(lambda p, t: DecoderModel(cfg).apply(p, Inputs(t)).logits_BTV)
    ids, scores = list(prompt), []
    width = len(prompt) + n
    for _ in range(n):
        logits = run(tree, jnp.asarray([ids + [0] * (width - len(ids))]))[0, len(ids) - 1]
        ids.append(int(jnp.argmax(logits)))
        scores.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    return ids[len(prompt) :], scores


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_reading_again(name: str) -> None:
    cfg = merge(BASE, MODELS[name], "model")
    tree = weights(cfg)
    (made,) = Generator(DecoderModel(cfg), tree)([PROMPTS[0]], GREEDY, max_new_tokens=9)
    tokens, scores = reread(cfg, tree, PROMPTS[0], 9)
    assert made[0].tokens == tokens and made[0].finish == "length"
    np.testing.assert_allclose(made[0].logprobs, scores, atol=2e-4)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(DecoderModel(BASE), weights(BASE))


def test_prompts_of_different_lengths_share_a_batch(generator: Generator) -> None:
    together = generator(PROMPTS, GREEDY, max_new_tokens=6)
    for prompt, made in zip(PROMPTS, together, strict=True):
        tokens, _ = reread(BASE, weights(BASE), prompt, 6)
        assert made[0].tokens == tokens


def test_a_sample_depends_on_its_seed_alone(generator: Generator) -> None:
    hot = Sampling(temperature=1.5)
    together = generator(PROMPTS, hot, max_new_tokens=6, seeds=[5, 6, 7], samples=2)
    alone = generator([PROMPTS[2]], hot, max_new_tokens=6, seeds=[7], samples=2)
    assert [g.tokens for g in alone[0]] == [g.tokens for g in together[2]]
    assert together[2][0].tokens != together[2][1].tokens
    other = generator([PROMPTS[2]], hot, max_new_tokens=6, seeds=[8])
    assert other[0][0].tokens != together[2][0].tokens


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.random.default_rng(0).integers(0, V, 45).tolist()
    tree = weights(BASE)
    tokens, _ = reread(BASE, tree, prompt, 4)
    for first, piece in ((8, 8), (16, 8)):
        monkeypatch.setattr(sampler, "FIRST", first)
        monkeypatch.setattr(sampler, "PIECE", piece)
        assert Generator(DecoderModel(BASE), tree)([prompt], GREEDY, max_new_tokens=4)[0][0].tokens == tokens


def test_a_stop_token_ends_its_row_only(generator: Generator) -> None:
    free = generator(PROMPTS, GREEDY, max_new_tokens=8)
    stop = free[0][0].tokens[2]
    made = generator(PROMPTS, GREEDY, max_new_tokens=8, stop=[stop])
    for before, after in zip(free, made, strict=True):
        tokens = before[0].tokens
        n = tokens.index(stop) + 1 if stop in tokens else 8
        assert after[0].tokens == tokens[:n] and after[0].finish == ("stop" if stop in tokens else "length")
    assert made[0][0].finish == "stop"


def test_streams_give_the_same_in_strides(generator: Generator) -> None:
    whole = generator(PROMPTS, GREEDY, max_new_tokens=7)
    for stride in (1, 3, 16):
        parts: list[list[int]] = [[] for _ in PROMPTS]
        ends = ["" for _ in PROMPTS]
        for n, _, tokens, scores, end in generator.stream(PROMPTS, GREEDY, max_new_tokens=7, stride=stride):
            assert len(tokens) == len(scores) <= stride
            parts[n] += tokens
            ends[n] = end
        assert parts == [g[0].tokens for g in whole] and ends == ["length"] * 3


def test_penalties_and_bias_reach_the_loop(generator: Generator) -> None:
    made = generator([PROMPTS[0]], Sampling(0.0, presence_penalty=1e4), max_new_tokens=8)[0][0].tokens
    assert len(set(made)) == 8
    once = Sampling(0.0, presence_penalty=100.0, bias=((0, 50.0),))
    made = generator([PROMPTS[0]], once, max_new_tokens=3)[0][0]
    assert made.tokens[0] == 0 and made.tokens[1] != 0
    assert made.logprobs[0] < -0.01  # the model's own, not that of the biased choice


def test_int8_caches_stay_close_and_take_a_third(generator: Generator) -> None:
    from lm import caches

    cfg = merge(BASE, {"d_model": 128, "head_dim": 32}, "model")
    plain, small = caches.init(cfg, 1, 100), caches.init(merge(cfg, INT8, "model"), 1, 100)
    assert caches.n_bytes(small) < 0.34 * caches.n_bytes(plain)
    text = jnp.asarray([np.random.default_rng(2).integers(0, V, 24)])
    tree = weights(BASE)
    for change in (MODELS["full"], MODELS["lm_infinite"]):
        cfg = merge(BASE, change, "model")
        model = DecoderModel(cfg)
        run = jax.jit(lambda p, t, i, c, model=model: model.apply(p, Inputs(t, index_BT=i), c))
        want = model.apply(tree, Inputs(text)).logits_BTV
        cache = caches.init(merge(cfg, INT8, "model"), 1, 24)
        out = []
        for at in (slice(0, 8), slice(8, 16), *(slice(i, i + 1) for i in range(16, 24))):
            index = jnp.arange(at.start, at.stop, dtype=jnp.int32)[None]
            made = run(tree, text[:, at], index, cache)
            cache = made.cache
            out.append(made.logits_BTV)
        error = jnp.linalg.norm(jnp.concatenate(out, 1) - want) / jnp.linalg.norm(want)
        assert 1e-6 < float(error) < 0.03


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"prompts": []}, "prompt: none given"),
        ({"prompts": [[1], []]}, "prompt 1: is empty"),
        ({"prompts": [[1, V]]}, f"prompt 0: unknown token id {V}; valid: 0 to {V - 1}"),
        ({"prompts": [[1]], "stop": [V]}, f"stop: unknown token id {V}"),
        ({"prompts": [[1]], "sampling": Sampling(bias=((-1, 1.0),))}, "bias: unknown token id -1"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens, samples: must be at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(generator: Generator, args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as e:
        generator(**args)
    assert words in str(e.value)


def test_prompts_that_do_not_fit_are_refused() -> None:
    tree = weights(BASE)
    small = merge(BASE, {"cache": {"name": "full", "capacity": 20}}, "model")
    with pytest.raises(UserError, match=r"the longest has 9 tokens, .* more than the cache of 20"):
        Generator(DecoderModel(small), tree)([[1] * 9], GREEDY, max_new_tokens=8)
    cfg = merge(BASE, MODELS["learned"], "model")
    with pytest.raises(UserError, match="60 tokens and 8 new ones, the model has 64 positions"):
        Generator(DecoderModel(cfg), weights(cfg))([[1] * 60], GREEDY, max_new_tokens=8)
