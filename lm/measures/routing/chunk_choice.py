"""Which chunks of a text the heads pick, and whether the one that holds the answer is among them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject, watched
from lm.measures.language.passkey import Passkey


@dataclass(frozen=True)
class ChunkChoice(Measure):
    """Reads pass-key prompts (fields and prompts are those of `lm.measures.language.passkey.Passkey`) under a
    pattern that records ``blocks``, and looks at the chunks picked by the tokens that predict the answer's digits.

    A head hits when a chunk that holds part of the sentence with the key is among those it sees. Samples, one per
    prompt: ``hit_rate`` (mean over layers, heads and digits), ``best_head`` (of the head that hits most),
    ``heads_above_half`` (share of heads that hit for more than half of the digits), ``chance`` (the hit rate of random
    picks). Curves: ``needle``, hit rate by layer and head; ``places``, by layer, how the freely picked chunks
    spread over `bins` equal parts of the text.
    """

    lengths: tuple[int, ...] = (16384,)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: int = 1
    digits: int = 5
    filler: str = "python-docs"
    bins: int = 16

    def __post_init__(self) -> None:
        self._prompts()
        if self.bins < 1:
            raise UserError(f"measures.chunk_choice.bins: must be at least 1, found {self.bins}")

    def _prompts(self) -> Passkey:
        try:
            return Passkey(self.lengths, self.depths, self.trials, self.digits, self.filler)
        except UserError as e:
            raise UserError(str(e).replace("measures.passkey", "measures.chunk_choice")) from None

    def identity(self) -> str:
        return self._prompts().identity()

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cost(self, cfg: ModelConfig) -> float:
        return self._prompts().cost(cfg)

    def check(self, subject: Subject, trains: bool) -> None:
        self._pattern(subject.config)
        self._prompts().check(subject, trains)

    def _pattern(self, cfg: ModelConfig) -> Any:
        """The model's pattern, which picks chunks; `UserError` for another one, and for prompts without any."""
        pattern = cfg.pattern.picks
        if pattern is None:
            raise UserError(
                f"measures.chunk_choice: pattern {type(cfg.pattern).__name__} picks no chunks; valid: an arm of "
                "longheads, or this measure left out of the arm's 'only'"
            )
        begin = pattern.begin
        if min(self.lengths) <= begin:
            raise UserError(
                f"measures.chunk_choice.lengths: {min(self.lengths)} tokens are all seen (begin_selective_length = "
                f"{begin}); valid: longer prompts"
            )
        return pattern

    def run(self, subject: Subject, progress: Progress) -> Measured:
        cfg = subject.config
        pattern, L, H = self._pattern(cfg), cfg.n_layers, cfg.n_heads
        steps, done = len(self.lengths) * len(self.depths) * self.trials * L, 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done / steps, "which chunks")

        samples: dict[str, list[float]] = {"hit_rate": [], "best_head": [], "heads_above_half": [], "chance": []}
        hits, places = np.zeros((L, H)), np.zeros((L, self.bins))
        n_prompts = 0
        for _, _, prompt, answer, needle in self._prompts().prompts(subject):
            text = prompt + answer[:-1]
            ids_LTHn = np.stack(watched(subject, text, "attn/blocks", len(answer), tick))
            queries = np.arange(len(prompt) - 1, len(text))
            wanted = {i // pattern.chunk for i in needle}
            hit_LH = hit(ids_LTHn, wanted).mean(1)
            hits += hit_LH
            places += spread(ids_LTHn, queries // pattern.chunk, self.bins)
            n_prompts += 1
            expected = np.mean([chance(wanted, int(t) // pattern.chunk, pattern.n_chunks) for t in queries])
            values = (hit_LH.mean(), hit_LH.max(), (hit_LH > 0.5).mean(), expected)
            for name, value in zip(samples, values, strict=True):
                samples[name].append(float(value))
        shared = {"kind": "grid", "y": list(range(L)), "ylabel": "layer"}
        total = np.maximum(places.sum(1, keepdims=True), 1)
        curves = {
            "needle": {
                **shared,
                "x": list(range(H)),
                "z": (hits / n_prompts).tolist(),
                "xlabel": "head",
                "zlabel": "sees the key's chunk",
            },
            "places": {
                **shared,
                "x": [round(float(b), 3) for b in (np.arange(self.bins) + 0.5) / self.bins],
                "z": (places / total).tolist(),
                "xlabel": "place in the text",
                "zlabel": "share of picked chunks",
            },
        }
        return Measured(samples, curves, {"filler": self.filler, "chunk": pattern.chunk, "chunks": pattern.n_chunks})


def hit(ids_LTHn: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """bool ``[L, T, H]``: whether any of the `wanted` chunks is listed."""
    return np.asarray(np.isin(ids_LTHn, list(wanted)).any(-1))


def spread(ids_LTHn: np.ndarray, own_T: np.ndarray, bins: int) -> np.ndarray:
    """Counts ``[L, bins]`` of picked chunks by place in the text before the query; the first chunk and the last two,
    which every head sees, are left out."""
    own = own_T[None, :, None, None]
    free = (ids_LTHn > 0) & (ids_LTHn < own - 1)
    part = np.clip(ids_LTHn * bins // np.maximum(own, 1), 0, bins - 1)
    return np.stack([np.bincount(p[f], minlength=bins) for p, f in zip(part, free, strict=True)]).astype(float)


def chance(wanted: Iterable[int], own: int, n: int) -> float:
    """The probability that n - 3 random picks of chunks ``1 … own - 2``, with the first and last two given, hit one of
    the `wanted` chunks."""
    wanted = set(wanted)
    if wanted & {0, own - 1, own}:
        return 1.0
    candidates, picks = own - 2, n - 3
    missed = candidates - len(wanted & set(range(1, own - 1)))
    return 1.0 - math.comb(missed, picks) / math.comb(candidates, picks)
