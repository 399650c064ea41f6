"""What rebuilding the house must leave as it was: programs, numbers, parameters' axes, content hashes, saved runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guards import experiments, models, programs

from experiments.spec import registry
from lm.config import model_config
from lm.interop import load
from lm.model import params as params_lib

HERE = Path(__file__).parent / "guards"
RECORDED = HERE / f"programs-jax{jax.__version__}.json"


@functools.cache
def made() -> dict[str, str]:
    return programs.hashes()


def test_programs_are_what_they_were() -> None:
    """Every program's text; where it is another on purpose, its results, to a few units in the last place."""
    assert RECORDED.is_file(), f"record {RECORDED.name} with code that is known to be good (tests/guards/programs.py)"
    want = json.loads(RECORDED.read_text())
    assert set(made()) >= set(want)  # configs come
    assert {name for name in want if made()[name] != want[name]} == set()


@pytest.mark.parametrize("name", programs.DECODE)
def test_cached_decoding_gives_the_numbers_it_gave(name: str) -> None:
    kept = np.load(HERE / "outputs.npz")
    want = kept[f"decode {name}"]
    np.testing.assert_allclose(models.decoded(models.model(name)), want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_committed_results_keep_their_addresses() -> None:
    want, found = json.loads((HERE / "results.json").read_text()), experiments.keys()
    assert {name: found.get(name) for name in want} == want


def test_axes_are_those_of_the_tables() -> None:
    """What parameters declare, against the tables of names that there were before they did."""
    kept = json.loads((HERE / "axes.json").read_text())
    found = {name: models.model(name) for name in models.CHANGES}
    found |= {f"trained {name}": model_config(changes) for name, changes in models.TRAINED.items()}
    for path in registry.files():
        for name, arm in experiments.planned(registry.load(path).settings("smoke")).arms.items():
            found[f"{path.stem}:smoke {name}"] = arm.trained or arm.config
    assert set(found) >= set(kept["models"])
    for name, table in kept["models"].items():
        cfg = found[name]
        assert params_lib.described(params_lib.axes(cfg), params_lib.abstract(cfg)) == kept["tables"][table], name


@pytest.mark.parametrize("name", ["moe", "lora"])
def test_a_stored_run_still_loads(name: str) -> None:
    """Written before keys were renamed: the same parameters, the same logits."""
    found: Any = load(str(HERE / "runs" / name))
    got = models.logits(found.config, found.params, jnp.arange(12)[None])
    np.testing.assert_allclose(got, np.load(HERE / "runs" / name / "logits.npy"), rtol=0, atol=2e-6)
