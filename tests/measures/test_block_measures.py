"""Costs and choices: what `prefill_cost`, `decode_cost` and `chunk_choice` report, against what is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest

from lm.config import build, merge, model_config
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.measures import Subject
from lm.measures.base import exponent
from lm.measures.language.passkey import Passkey
from lm.measures.routing.chunk_choice import chance, hit, spread
from lm.model import params as params_lib
from lm.plug import table

CFG = model_config(
    {
        "vocab_size": 258,
        "d_model": 16,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 16,
        "max_positions": 64,
        "pattern": {"name": "longheads", "chunk": 8, "attention_length": 40},
    }
)


def subject(cfg: Any = CFG, layers: str = "stacked") -> Subject:
    tree = params_lib.init(cfg, jax.random.key(0))
    return Subject(cfg, params_lib.unstack(tree) if layers == "apart" else tree, ByteTokenizer())


def measure(name: str, **fields: Any) -> Any:
    return build(table("lm.measures")[name], fields, f"measures.{name}")


def quiet(share: float, what: str) -> None:
    assert 0 < share <= 1


def test_an_exponent_is_the_slope_over_logarithms() -> None:
    lengths = [100, 300, 1000]
    for p in (0.0, 1.0, 1.7):
        assert exponent(lengths, [3.0 * n**p for n in lengths]) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize("layers", ["stacked", "apart"])
def test_prefill_cost_reads_so_many_layers(layers: str) -> None:
    made = measure("prefill_cost", lengths=(32, 64), layers=2, repeats=2).run(subject(layers=layers), quiet)
    assert {k: len(v) for k, v in made.samples.items()} == {"ms@32": 2, "ms@64": 2, "exponent": 1}
    assert min(made.samples["ms@32"]) > 0 and made.notes["layers"] == 2
    medians = [float(np.median(made.samples[f"ms@{n}"])) for n in (32, 64)]
    assert made.curves["prefill_ms"]["y"] == medians
    assert made.samples["exponent"][0] == pytest.approx(math.log2(medians[1] / medians[0]))
    assert made.curves["prefill_ms"]["ylabel"] == "milliseconds, 2 of 3 layers"
    one = measure("prefill_cost", lengths=(32,))
    assert "exponent" not in one.run(subject(), quiet).samples
    assert one.cost(CFG) == 3 * measure("prefill_cost", lengths=(32,), layers=1).cost(CFG)


def test_decode_cost_under_longheads() -> None:
    """Bytes: keys, values and index of every slot, a vector per chunk and head, one chunk of queries."""
    made = measure("decode_cost", lengths=(40, 80), steps=2).run(subject(), quiet)
    assert set(made.samples) == {"ms@40", "ms@80", "cache_mib@40", "cache_mib@80", "exponent"}
    d, n = 4, -(-(80 + 4) // 8)
    want = 3 * 4 * (2 * n * 8 * 2 * d + n * 8 + n * 4 * d + 8 * 4 * d)
    assert made.samples["cache_mib@80"][0] * 2**20 == want


def test_chunk_choice_on_a_model() -> None:
    choice = measure("chunk_choice", lengths=(256, 400), depths=(0.3, 0.6), digits=3, filler="kjv:Jude", bins=5)
    made = choice.run(subject(), quiet)
    assert {len(v) for v in made.samples.values()} == {4}
    grid = np.array(made.curves["needle"]["z"])
    assert grid.shape == (3, 4) and made.curves["needle"]["y"] == [0, 1, 2]
    assert grid.mean() == pytest.approx(np.mean(made.samples["hit_rate"]))
    places = np.array(made.curves["places"]["z"])
    assert places.shape == (3, 5)
    np.testing.assert_allclose(places.sum(1), 1.0)
    assert all(b >= h for b, h in zip(made.samples["best_head"], made.samples["hit_rate"], strict=True))


def test_the_needle_is_where_it_is_said_to_be() -> None:
    tokenizer = ByteTokenizer()
    prompts = list(Passkey((200, 300), (0.0, 0.7), 2, 4, "kjv:Jude").prompts(subject()))
    assert len(prompts) == 8
    for j, i, prompt, answer, told in prompts:
        assert len(prompt) == (200, 300)[j] and i in (0, 1)
        sentence, key = tokenizer.decode(prompt[told.start : told.stop]), tokenizer.decode(answer).strip()
        assert len(key) == 4 and sentence.strip().startswith(f"The pass key is {key}.")


def test_hits_and_places_counted_by_hand() -> None:
    ids = np.array(
        [[[[0, 3, 5, 8, 9]], [[0, 2, 5, 8, 9]]], [[[0, -1, 7, 8, 9]], [[0, 1, 4, 8, 9]]]]
    )  # L=2, T=2, H=1, n=5
    assert hit(ids, {3, 4}).tolist() == [[[True], [False]], [[False], [True]]]
    assert spread(ids, np.array([9, 9]), 3).tolist() == [[1, 3, 0], [1, 1, 1]]  # 0, 8, 9 are given, -1 is none


def test_chance_is_the_share_of_all_picks() -> None:
    own, n = 9, 6
    for wanted in ({4}, {4, 5}, {1, 7}, {3, 8}, {0}, {9}):
        picks = list(itertools.combinations(range(1, own - 1), n - 3))
        hits = sum(bool(wanted & {0, own - 1, own, *p}) for p in picks)
        assert chance(wanted, own, n) == pytest.approx(hits / len(picks))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (64,)}, "measures.chunk_choice.lengths: each must be at least 128"),
        ({"depths": (1.5,)}, "measures.chunk_choice.depths: each must be in"),
        ({"bins": 0}, "measures.chunk_choice.bins: must be at least 1"),
    ],
)
def test_bad_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure("chunk_choice", **fields)


def test_bad_costs_and_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"measures.prefill_cost: lengths and repeats"):
        measure("prefill_cost", lengths=())
    with pytest.raises(UserError, match=r"measures.prefill_cost.layers: must be at least 1 or None, found 0"):
        measure("prefill_cost", layers=0)
    causal = merge(CFG, {"pattern": "causal"}, "model")
    with pytest.raises(UserError, match="pattern Causal picks no chunks"):
        measure("chunk_choice").run(subject(causal), quiet)
    wide = merge(CFG, {"pattern": {"begin_selective_length": 400}}, "model")
    with pytest.raises(UserError, match=r"lengths: 256 tokens are all seen"):
        measure("chunk_choice", lengths=(256,)).run(subject(wide), quiet)
