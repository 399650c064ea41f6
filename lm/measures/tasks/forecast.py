"""Probabilistic forecasts of a series: by the model, by the season before, and by exponential smoothing."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lm.config import ModelConfig
from lm.data.texts import series
from lm.data.tokenizers.values import ValueTokenizer
from lm.decoding.generator import Generator
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject
from lm.plug import SEEDS, bounded, check_bounds

LEVELS = np.arange(1, 10) / 10  # the quantiles of the weighted quantile loss


@dataclass(frozen=True)
class Forecast(Measure):
    """`windows` forecasts of `horizon` values of `series` (a spec of `lm.data.texts.series`, without windows), origins
    evenly spaced over what follows the share `start`, which no training should have seen.

    `method`: ``model`` draws `paths` continuations of the last `context` values (temperature 1) from the subject, whose
    tokenizer must be ``values:BINS:CONTEXT``; ``seasonal_naive`` repeats the last `season` values; ``ets`` is additive
    exponential smoothing with a damped trend and a season (statsmodels), fitted to the last `history` values before
    each origin, `paths` simulations. The latter two read nothing of the subject.

    Samples, one per seed: ``mase``, the absolute error of the median over that of the seasonal naive forecast inside
    the last `history` values (arXiv 2403.07815, section 5.2), mean over windows; ``wql``, the quantile loss at 0.1 …
    0.9, averaged over them, over the sum of absolute values; ``coverage80``, the share of values between the quantiles
    0.1 and 0.9.
    """

    series: str = "fpp2/elecdemand#Demand"
    method: Literal["model", "seasonal_naive", "ets"] = "model"
    season: int = bounded(48, at_least=1)
    context: int = bounded(144, at_least=1)
    horizon: int = bounded(48, at_least=1)
    history: int = 672
    windows: int = bounded(16, at_least=1)
    paths: int = bounded(20, at_least=1)
    start: float = 0.8

    def __post_init__(self) -> None:
        check_bounds(self, "measures.forecast")
        if self.history < max(2 * self.season + 1, self.context):
            raise UserError(
                f"measures.forecast.history: {self.history} values; valid: at least two seasons and one value, and the "
                f"context, {max(2 * self.season + 1, self.context)}"
            )
        if not 0.0 < self.start < 1.0:
            raise UserError(f"measures.forecast.start: must lie in (0, 1), found {self.start}")
        for key in ("start=", "stop=", "length=", "stride="):
            if key in self.series:
                raise UserError(
                    f"measures.forecast.series: {self.series!r}: {key[:-1]} is this measure's own to choose"
                )

    @property
    def untrained(self) -> bool:
        """Whether the subject's parameters are read at all."""
        return self.method != "model"

    def identity(self) -> str:
        import hashlib

        return hashlib.sha256(series.values(self.series).tobytes()).hexdigest()[:32]

    def cost(self, cfg: ModelConfig) -> float:
        return float(self.windows * (self.context + self.paths * self.horizon))

    def check(self, subject: Subject, trains: bool) -> None:
        self._values()
        if self.method == "model":
            self._tokenizer(subject)
        if self.method == "ets" and importlib.util.find_spec("statsmodels") is None:
            raise UserError(
                "measures.forecast.method: 'ets' needs statsmodels; get it with: pip install 'decoder-lab[series]'"
            )

    def _values(self) -> tuple[np.ndarray, int, int]:
        """The series, and the first and last place to forecast from; `UserError` where there is none."""
        values = series.values(self.series)
        first, last = round(self.start * len(values)), len(values) - self.horizon
        if first < self.history or last < first:
            raise UserError(
                f"measures.forecast.start: {self.series} has {len(values)} values; {self.history} of history before "
                f"the share {self.start} and a horizon of {self.horizon} after it do not fit"
            )
        return values, first, last

    def run(self, subject: Subject, progress: Progress) -> Measured:
        values, first, last = self._values()
        origins = np.unique(np.linspace(first, last, self.windows).round().astype(int))
        paths = self._paths(subject, values, origins, progress)
        truth = np.stack([values[o : o + self.horizon] for o in origins])
        past = np.stack([values[o - self.history : o] for o in origins])
        scores = score(truth, paths, past, self.season)
        by_step = np.abs(truth - np.median(paths, 1)) / seasonal_error(past, self.season)[:, None]
        curve = {
            "x": list(range(1, self.horizon + 1)),
            "y": by_step.mean(0).tolist(),
            "xlabel": "values ahead",
            "ylabel": "scaled absolute error of the median",
        }
        notes = {"series": self.series, "values": len(values), "windows": len(origins), "method": self.method}
        return Measured({k: [v] for k, v in scores.items()}, {"error": curve}, notes)

    def _paths(self, subject: Subject, values: np.ndarray, origins: np.ndarray, progress: Progress) -> np.ndarray:
        """``[windows, paths, horizon]``."""
        if self.method == "model":
            return self._sampled(subject, values, origins, progress)
        out = []
        for i, o in enumerate(origins):
            progress(i / len(origins), f"{self.method} {i + 1}/{len(origins)}")
            if self.method == "ets":
                out.append(self._ets(values[o - self.history : o], (subject.seed + i) % SEEDS))
            else:
                out.append(np.resize(values[o - self.season : o], self.horizon)[None])
        return np.stack(out)

    def _ets(self, past: np.ndarray, seed: int) -> np.ndarray:
        try:
            from statsmodels.tsa.exponential_smoothing.ets import ETSModel
        except ImportError:
            raise UserError(
                "measures.forecast.method: 'ets' needs statsmodels; get it with: pip install 'decoder-lab[series]'"
            ) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optimizer, about windows that it fits less well
            model = ETSModel(
                past, error="add", trend="add", damped_trend=True, seasonal="add", seasonal_periods=self.season
            )
            fit = model.fit(disp=False, maxiter=200)
            drawn = fit.simulate(self.horizon, repetitions=self.paths, anchor="end", rng=seed)
        return np.asarray(drawn, np.float64).reshape(self.horizon, -1).T

    def _tokenizer(self, subject: Subject) -> ValueTokenizer:
        tokenizer = subject.tokenizer
        if not isinstance(tokenizer, ValueTokenizer) or tokenizer.context != self.context:
            found = tokenizer.identity if tokenizer is not None else None
            raise UserError(
                f"measures.forecast.context: the model's tokenizer is {found!r}; valid: train.data.tokenizer = "
                f"'values:BINS:{self.context}'"
            )
        return tokenizer

    def _sampled(self, subject: Subject, values: np.ndarray, origins: np.ndarray, progress: Progress) -> np.ndarray:
        tokenizer = self._tokenizer(subject)
        contexts = [values[o - self.context : o] for o in origins]
        scales = np.array([tokenizer.scale(c) for c in contexts])
        prompts = [tokenizer.quantise(c / s).tolist() for c, s in zip(contexts, scales, strict=True)]
        again, first = divmod(subject.seed, SEEDS // 1000)  # no two seeds begin at the same number
        seeds = [(1000 * first + again + i) % SEEDS for i in range(len(prompts))]
        ids = np.zeros((len(prompts), self.paths, self.horizon), np.int64)
        at = np.zeros(ids.shape[:2], int)
        generator = Generator(subject.model, subject.params)
        for n, s, tokens, _, _ in generator.stream(
            prompts, max_new_tokens=self.horizon, seeds=seeds, samples=self.paths
        ):
            ids[n, s, at[n, s] : at[n, s] + len(tokens)] = tokens
            at[n, s] += len(tokens)
            progress(float(at.mean()) / self.horizon, f"{self.series}, {at.mean():.0f} of {self.horizon} values")
        return tokenizer.centres(ids) * scales[:, None, None]


def seasonal_error(past_Wn: np.ndarray, season: int) -> np.ndarray:
    """Mean absolute change from one season to the next, ``[W]``."""
    return np.abs(past_Wn[:, season:] - past_Wn[:, :-season]).mean(1)


def score(truth_WH: np.ndarray, paths_WSH: np.ndarray, past_Wn: np.ndarray, season: int) -> dict[str, float]:
    """``mase``, ``wql`` and ``coverage80`` of `paths_WSH`, S sample paths for each of W windows of H values."""
    error = np.abs(truth_WH - np.median(paths_WSH, 1)).mean(1)
    quantiles = np.quantile(paths_WSH, LEVELS, axis=1)  # [9, W, H]
    over = truth_WH - quantiles
    loss = np.maximum(LEVELS[:, None, None] * over, (LEVELS[:, None, None] - 1) * over)
    inside = (truth_WH >= quantiles[0]) & (truth_WH <= quantiles[-1])
    return {
        "mase": float((error / seasonal_error(past_Wn, season)).mean()),
        "wql": float((2 * loss.sum((1, 2)) / np.abs(truth_WH).sum()).mean()),
        "coverage80": float(inside.mean()),
    }
