"""Every seed from 0 to 2^32 - 1 is a seed of its own; others are refused with the range, wherever one is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from experiments.commands import generate
from experiments.spec import settings
from lm.config import build, model_config
from lm.data.corpus import Corpus
from lm.data.loader import Loader
from lm.data.packing import Packed
from lm.errors import UserError
from lm.ffn.moe.routers import Hash
from lm.heads.fourier import Fourier
from lm.train.config import TrainConfig
from lm.train.samples import Samples
from lm.train.step import initial

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)
BEYOND = (-1, 2**32, 2**32 + 1, 2**63, 2**64, 10**30)


def test_the_state_of_a_training_holds_every_seed() -> None:
    cfg = model_config({"vocab_size": 8, "d_model": 4, "n_layers": 1, "n_heads": 1, "d_ff": 4, "max_positions": 8})
    train = build(TrainConfig, {"steps": 2}, "train")
    states = [initial(cfg, train, {"w": np.ones(2, np.float32)}, seed)["seed"] for seed in SEEDS]
    assert [int(s) for s in states[:3]] == list(SEEDS[:3])  # as it has been
    keys = {tuple(np.asarray(jax.random.key_data(jax.random.key(s))).tolist()) for s in states}
    assert len(keys) == len(SEEDS)
    drawn = {tuple(np.asarray(jax.random.key_data(jax.random.key(s))).tolist()) for s in SEEDS}
    assert len(drawn) == len(SEEDS)


def test_the_order_of_rows_depends_on_every_seed() -> None:
    n = 64
    corpus = Corpus(np.arange(n * 4, dtype=np.uint16), np.array([0, n * 4]), np.array([n * 4]), ("a",), "a")
    packed = Packed(corpus, 4, "concat")
    for weights, sources in ((None, [packed]), ((1.0, 1.0), [packed, packed])):
        orders = {Loader(sources, weights, 32, seed).at(0)["inputs"].tobytes() for seed in SEEDS}
        assert len(orders) == len(SEEDS)


def experiment(seed: int) -> object:
    return settings.experiment(
        {
            "name": "a",
            "scale": "b",
            "checkpoint": "random",
            "baseline": "x",
            "arms": {"x": {}},
            "measures": {"m": {"name": "passkey"}},
            "seeds": (seed,),
        }
    )


PLACES: dict[str, Callable[[int], Any]] = {
    "config.seeds": experiment,
    "train.samples.seed": lambda seed: Samples(seed=seed),
    "model.ffn.router.seed": lambda seed: Hash(seed=seed),
    "model.head.shuffle": lambda seed: Fourier(shuffle=seed),
    "--seed": lambda seed: generate.check_seed(seed, "--seed"),
}


@pytest.mark.parametrize("place", PLACES)
def test_seeds_that_would_be_cut_are_refused(place: str) -> None:
    for seed in SEEDS:
        PLACES[place](seed)
    for seed in BEYOND:
        with pytest.raises(UserError, match=rf"{place}.*(at least 0|0 to 4294967295|of at most 100,000,000,000)"):
            PLACES[place](seed)
