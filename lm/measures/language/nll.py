"""Negative log-likelihood and perplexity by position in long documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm.config import ModelConfig
from lm.data import texts
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject, beginning, score


@dataclass(frozen=True)
class NllByPosition(Measure):
    """Reads the first `tokens` tokens of each document of `texts` (specs of `lm.data.texts`, one document each unless
    a spec yields more; `documents` caps them).

    With `context`, text is re-read in windows of that many tokens that start over at position 0 and overlap by half,
    every token scored once with at least half a window of context (the truncation baseline). `trained` splits
    positions: *inside* is below it, *beyond* is from ``margin * trained`` on; None = the model's `max_positions`.
    Samples, one per document: ``nll_inside``, ``nll_beyond``, ``nll_gap`` (beyond - inside), in nats per token,
    ``ppl_inside``, ``ppl_beyond``, and ``bits_per_byte`` over everything. Curves average `bin` tokens.
    """

    texts: tuple[str, ...] = ("kjv:Genesis",)
    tokens: int = 4096
    documents: int | None = None
    bin: int = 512
    context: int | None = None
    trained: int | None = None
    margin: float = 1.3
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("tokens", "bin"):
            if getattr(self, name) < 2:
                raise UserError(f"measures.nll.{name}: must be at least 2, found {getattr(self, name)}")
        if self.context is not None and self.context < 4:
            raise UserError(f"measures.nll.context: must be at least 4 or None, found {self.context}")

    def _documents(self) -> list[Any]:
        found = [d for spec in self.texts for d in texts.documents(spec)]
        return found[: self.documents]

    def identity(self) -> str:
        return texts.identity(self._documents())

    @property
    def longest(self) -> int:
        return self.tokens

    def cost(self, cfg: ModelConfig) -> float:
        """Tokens read, with the quadratic part of attention in units of 8k tokens."""
        n = self.context or self.tokens
        passes = 1 if self.tokens <= n else 1 + math.ceil((self.tokens - n) / (n // 2))  # as many as `_windows`
        return len(self.texts) * passes * n * (1.0 + n / 8192)

    def _windows(self) -> list[tuple[int, int, int]]:
        """(start, stop, scored): windows of token indices and how many last tokens each scores."""
        if self.context is None or self.tokens <= self.context:
            return [(0, self.tokens, self.tokens - 1)]
        out, done = [(0, self.context, self.context - 1)], self.context
        while done < self.tokens:
            stop = min(done + self.context // 2, self.tokens)
            out.append((stop - self.context, stop, stop - done))
            done = stop
        return out

    def check(self, subject: Subject, trains: bool) -> None:
        self._encoded(subject)

    def _encoded(self, subject: Subject) -> list[tuple[Any, list[int]]]:
        """Every document with its first tokens; `UserError` for one that is too short."""
        return [(d, beginning(subject, d, self.tokens, "measures.nll")) for d in self._documents()]

    def run(self, subject: Subject, progress: Progress) -> Measured:
        trained = self.trained or subject.model.trained_length
        docs = self._encoded(subject)
        windows = self._windows()
        steps = len(docs) * len(windows) * subject.n_layers
        done = 0
        curves = []
        for doc, ids in docs:

            def tick(name: str = doc.name) -> None:
                nonlocal done
                done += 1
                progress(done / steps, name)

            pieces = [score(subject, ids[a:b], n, tick)[0] for a, b, n in windows]
            curves.append(np.concatenate(pieces))
        return self._summary(subject, docs, np.stack(curves), trained)

    def _summary(self, subject: Subject, docs: list[Any], nll_DT: np.ndarray, trained: int) -> Measured:
        position = np.arange(1, self.tokens)  # nll[i] belongs to token i + 1
        inside, beyond = position < trained, position >= self.margin * trained
        own = len(subject.tokenizer.before)  # no text
        n_bytes = [len(subject.tokenizer.decode(ids[own:]).encode()) for _, ids in docs]
        samples = {
            "bits_per_byte": [float(row.sum() / math.log(2) / size) for row, size in zip(nll_DT, n_bytes, strict=True)],
            "nll_inside": [float(row[inside].mean()) for row in nll_DT],
        }
        if beyond.any():
            samples["nll_beyond"] = [float(row[beyond].mean()) for row in nll_DT]
            pairs = zip(samples["nll_beyond"], samples["nll_inside"], strict=True)
            samples["nll_gap"] = [b - a for b, a in pairs]
            samples["ppl_beyond"] = [math.exp(min(x, 700.0)) for x in samples["nll_beyond"]]
        samples["ppl_inside"] = [math.exp(min(x, 700.0)) for x in samples["nll_inside"]]
        edges = range(0, self.tokens, self.bin)
        binned = np.stack([[row[max(a - 1, 0) : a - 1 + self.bin].mean() for a in edges] for row in nll_DT])
        centres = [float(a + min(self.bin, self.tokens - a) / 2) for a in edges]
        marks = [{"x": trained, "text": "trained length"}] if trained < self.tokens else []
        shared = {"x": centres, "xlabel": "position, tokens", "marks": marks, "names": [d.name for d, _ in docs]}
        nll = {"y": binned.mean(0).tolist(), "y_by_sample": binned.tolist(), "ylabel": "NLL, nats per token"}
        ppl = {"y": np.exp(binned.mean(0)).tolist(), "ylabel": "perplexity", "log": True}
        notes = {
            "documents": [
                {"name": d.name, "source": d.source, "licence": d.licence, "tokens": self.tokens} for d, _ in docs
            ]
        }
        return Measured(samples, {"nll": {**shared, **nll}, "perplexity": {**shared, **ppl}}, notes)
