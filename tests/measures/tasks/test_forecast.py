"""Forecasts: scores against loops from their definitions, the seasonal and classical forecasters, the model's paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm.config import model_config
from lm.data.tokenizers import ByteTokenizer
from lm.data.tokenizers.values import ValueTokenizer
from lm.errors import UserError
from lm.measures import TABLE, Subject
from lm.measures.tasks.forecast import score
from lm.model import params as params_lib

FIELDS: dict[str, Any] = {"season": 6, "context": 12, "horizon": 5, "history": 30, "windows": 3, "paths": 4}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A season of 6 with a trend and no noise in `clean`, some in `noisy`."""
    path = tmp_path_factory.mktemp("series") / "table.csv"
    t = np.arange(200)
    clean = 20 + 3 * np.sin(2 * np.pi * t / 6)
    noisy = clean + np.random.default_rng(0).normal(size=200)
    rows = [f"{a:.9f},{b:.9f}" for a, b in zip(clean, noisy, strict=True)]
    path.write_text("clean,noisy\n" + "\n".join(rows) + "\n")
    return path


def run(subject: Subject | None, series: str, **fields: Any) -> Any:
    nobody = Subject(model_config({}), None, None)
    plug = TABLE["forecast"](series=series, **{**FIELDS, **fields})
    return plug.run(subject or nobody, lambda fraction, text: None)


def test_scores_are_their_definitions() -> None:
    rng = np.random.default_rng(1)
    truth, paths, past = rng.normal(size=(3, 5)) + 5, rng.normal(size=(3, 11, 5)) + 5, rng.normal(size=(3, 20))
    got = score(truth, paths, past, 4)
    mase, loss, inside = [], np.zeros(9), 0
    for w in range(3):
        naive = np.mean([abs(past[w, i] - past[w, i - 4]) for i in range(4, 20)])
        errors = []
        for h in range(5):
            draws = np.sort(paths[w, :, h])
            errors.append(abs(truth[w, h] - draws[5]) / naive)
            for k, level in enumerate(np.arange(1, 10) / 10):
                q = draws[round(10 * level)]  # eleven draws: the deciles are draws
                loss[k] += 2 * (level * max(truth[w, h] - q, 0) + (1 - level) * max(q - truth[w, h], 0))
            inside += draws[1] <= truth[w, h] <= draws[9]
        mase.append(np.mean(errors))
    np.testing.assert_allclose(got["mase"], np.mean(mase), rtol=1e-12)
    np.testing.assert_allclose(got["wql"], np.mean(loss / np.abs(truth).sum()), rtol=1e-12)
    np.testing.assert_allclose(got["coverage80"], inside / 15, rtol=1e-12)


def test_seasonal_naive(table: Path) -> None:
    """Exact where every season is the last one; its quantile loss is the absolute error over the sum of values."""
    noisy = run(None, f"{table}#noisy", method="seasonal_naive", windows=2)
    values = np.loadtxt(table, delimiter=",", skiprows=1)[:, 1]
    errors, total = 0.0, 0.0
    for o in (160, 195):
        errors += sum(abs(values[o + h] - values[o + h - 6]) for h in range(5))
        total += sum(abs(values[o + h]) for h in range(5))
    np.testing.assert_allclose(noisy.samples["wql"], [errors / total], rtol=1e-6)
    assert TABLE["forecast"](method="seasonal_naive").untrained and not TABLE["forecast"]().untrained


def test_exponential_smoothing(table: Path) -> None:
    """A season without noise is found; with noise the median beats repeating the last season."""
    naive, ets = (run(None, f"{table}#noisy", method=m, history=96, paths=100) for m in ("seasonal_naive", "ets"))
    assert ets.samples["mase"][0] < naive.samples["mase"][0]
    assert 0.5 < ets.samples["coverage80"][0] <= 1.0


def test_models_paths_are_scaled_back(table: Path) -> None:
    """A model of one certain answer: every path is that bin's centre times the context's mean size."""
    tokenizer = ValueTokenizer(bins=16, context=12, low=0.0, high=2.0)
    head = {"name": "linear", "tie": False, "bias": True}
    cfg = model_config({"vocab_size": 16, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8, "head": head})
    params = params_lib.init(cfg, jax.random.key(0))
    params["head"]["bias"] = params["head"]["bias"].at[9].set(50.0)
    subject = Subject(cfg, params, tokenizer)
    got = run(subject, f"{table}#noisy", windows=2).samples
    values = np.loadtxt(table, delimiter=",", skiprows=1)[:, 1]
    errors = []
    for o in (160, 195):
        answer = (9.5 / 8) * np.abs(values[o - 12 : o]).mean()
        errors.append(np.abs(values[o : o + 5] - answer))
    total = np.abs(np.concatenate([values[o : o + 5] for o in (160, 195)])).sum()
    np.testing.assert_allclose(got["wql"], [np.sum(errors) / total], rtol=1e-5)


def test_paths_depend_on_the_seed_alone(table: Path) -> None:
    tokenizer = ValueTokenizer(bins=16, context=12, low=0.0, high=2.0)
    cfg = model_config({"vocab_size": 16, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8, "head": "fourier"})
    params = params_lib.init(cfg, jax.random.key(0))
    one, two, other = (run(Subject(cfg, params, tokenizer, seed), f"{table}#noisy").samples for seed in (0, 0, 1))
    assert one == two and one != other


def test_foreign_tokenizers_are_refused(table: Path) -> None:
    for tokenizer in (None, ByteTokenizer(), ValueTokenizer(16, 11, 0.0, 2.0)):
        with pytest.raises(UserError, match=r"measures\.forecast\.context: .*values:BINS:12"):
            run(Subject(model_config({}), None, tokenizer), f"{table}#noisy")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"horizon": 0}, r"measures\.forecast\.horizon: must be at least 1, found 0"),
    ({"history": 12}, r"measures\.forecast\.history: 12 values; valid: .*13"),
    ({"start": 1.0}, r"measures\.forecast\.start: must lie in \(0, 1\), found 1\.0"),
    (
        {"series": "a/b#c?stop=0.5"},
        r"measures\.forecast\.series: .*stop is this measure's own",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TABLE["forecast"](**{**FIELDS, **fields})


def test_series_too_short_are_refused(table: Path) -> None:
    with pytest.raises(UserError, match=r"measures\.forecast\.start: .* has 200 values; 190 of history"):
        run(None, f"{table}#noisy", method="seasonal_naive", history=190)
