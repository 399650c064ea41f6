"""Rotary scalings and their controls past the trained length, none of them trained for it.

Position interpolation (arXiv 2306.15595), NTK-aware, dynamic NTK and YaRN (arXiv 2309.00071) on a Llama trained at 128
tokens, by position up to 8 times as far, each with the factor its length asks for; beside them full attention as it is,
a window, LM-Infinite, and the text's own difficulty (a fresh context inside the trained length). ALiBi
(arXiv 2108.12409) and no positions at all (arXiv 2305.19466) are trained from scratch on the same rows.

Hypothesis, at twice the trained length: as it is >> interpolation > NTK >= dynamic NTK and YaRN; ALiBi is flat by
construction, no positions fail a little past the trained length. Measured at ``:laptop``, nats beyond the length at 2 /
4 / 8 times: as it is 3.39 / 3.68 / 3.86, interpolation 3.14 / 3.62 / 3.94, NTK 3.05 / 3.32 / 3.59, dynamic NTK 3.00 /
3.15 / 3.24, YaRN 3.00 / 3.14 / 3.20, a window or a fresh context 2.96 / 3.04 / 3.02, ALiBi 2.98 / 3.06 / 3.05: no
scaling is as good as forgetting.

``:smollm2`` reads SmolLM2-135M at 16k tokens (2x), two texts: as it is 5.62, interpolation 3.52, NTK 2.55, dynamic NTK
2.57, YaRN 2.52, a window 3.03, LM-Infinite and a fresh context 2.50: the order is the papers'. Pass keys, two prompts a
length: beyond the trained length dynamic NTK finds one of two, the others none.
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` (3 seeds, 1.0 M parameters, 3 trainings each) about 15 minutes,
``:smollm2`` about 75. ``:gpu`` is 124 M parameters trained at 1,024; ``:paper`` Llama-2-7B at 32k.
``python -m experiments.sweep --config=configs/rope_variants.py --sweep=factor`` gives every scaling other factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.bases import short, small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "smollm2", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = tuple(
    {"step": "decode", "arm": arm, "topology": "v5e:2x4", "length": 32768} for arm in ("yarn@8", "dynamic@8", "window")
)
TIMES = (2, 4, 8)
SCALINGS = ("linear", "ntk", "dynamic", "yarn")


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "rope_variants"
    c.scale = scale
    c.paper = {
        "title": "YaRN: Efficient Context Window Extension of Large Language Models",
        "arxiv": "2309.00071",
        "claim": "without training, scaling by parts keeps a model fluent past its length where interpolation does not",
        "numbers": {"Llama-2-7B, 8k tokens, untrained": "perplexity: as it is > 100, dynamic YaRN 3.5 (fig. 4)"},
    }
    c.checkpoint, c.baseline, c.seeds = "random", "full", (0, 1, 2)
    times: tuple[int, ...] = TIMES
    L, texts = short.LENGTH, short.books(short.READ)
    c.model, c.train = short.model(), short.train()
    passkey: dict[str, Any] | None = None
    if scale == "smoke":
        L, texts, times = 64, ("kjv:Genesis",), (2,)
        c.seeds, c.model, c.train = (0,), small.model("smoke"), small.train("smoke")
    elif scale == "smollm2":
        L, times, texts = 8192, (2,), ("kjv:Genesis", "python-docs")
        c.checkpoint, c.seeds, c.model, c.train = "smollm2-135m", (0,), {}, {}
        passkey = {"name": "passkey", "filler": "python-docs", "lengths": (4096, 16384), "depths": (0.25, 0.75)}
    elif scale == "gpu":
        L = 1024
        c.model, c.train = small.model("gpu"), small.train("gpu")
    elif scale == "paper":
        L, texts = 4096, ("kjv:Genesis", "kjv:Psalms")
        c.checkpoint, c.seeds, c.train = "checkpoints/Llama-2-7b-hf", (0,), {}
        c.architecture, c.model = "llama2_7b", {"dtype": "bfloat16"}
        passkey = {"name": "passkey", "lengths": (4096, 8192, 16384, 32768), "trials": 10}
    c.measures = {
        f"x{n}": {"name": "nll_by_position", "texts": texts, "tokens": n * L, "trained": L, "bin": max(n * L // 32, 4)}
        for n in times
    }
    if passkey is not None:
        c.measures["passkey"] = passkey
    c.arms = ConfigDict(_arms(L, times, scratch=c.checkpoint == "random"), allow_dotted_keys=True)
    return c


def _arms(L: int, times: tuple[int, ...], scratch: bool) -> dict[str, dict[str, Any]]:
    lengths = tuple(f"x{n}" for n in times)
    arms: dict[str, dict[str, Any]] = {"full": {}}
    for name in SCALINGS:
        for n in times:
            only = (f"x{n}",) if scratch or n != times[-1] else (f"x{n}", "passkey")
            arms[f"{name}@{n}"] = {
                "model.positions.scaling.name": name,
                "model.positions.scaling.factor": float(n),
                "only": only,
            }
    arms["window"] = {"model.pattern.name": "sliding_window", "model.pattern.window": L}
    arms["lm_infinite"] = {
        "model.pattern.name": "lm_infinite",
        "model.pattern.window": L,
        "model.pattern.ceiling": float(L),
    }
    # The text's own difficulty: the same tokens with a fresh context inside the trained length.
    arms["truncation"] = {"only": lengths, **{f"measures.{at}.context": L for at in lengths}}
    if scratch:
        arms["alibi"] = {"model.positions.name": "alibi", "trains": True}
        arms["nope"] = {"model.positions.name": "nope", "trains": True}
    return arms


def sweep_factor() -> Iterator[dict[str, Any]]:
    """Every scaling at half, once and twice the factor that its length asks for."""
    for share in (0.5, 1.0, 2.0):
        yield {f"arms.{name}@{n}.model.positions.scaling.factor": share * n for name in SCALINGS for n in TIMES}


def claims(r: Results) -> list[Claim]:
    def beyond(n: int, *arms: str) -> dict[str, float]:
        return {a: r.mean(a, f"x{n}/nll_beyond") for a in arms}

    def needed() -> tuple[bool, dict[str, float]]:
        m = beyond(2, "full", "truncation")
        return m["full"] - m["truncation"] > 0.5, m

    def order() -> tuple[bool, dict[str, float]]:
        m = beyond(2, "full", "linear@2", "ntk@2", "dynamic@2", "yarn@2")
        best = min(m["dynamic@2"], m["yarn@2"])
        return m["full"] > m["linear@2"] > m["ntk@2"] >= best, m

    def parts() -> tuple[bool, dict[str, float]]:
        m: dict[str, float] = {}
        for n in TIMES:
            if r.has(f"yarn@{n}", f"x{n}/nll_beyond"):
                m |= beyond(n, f"linear@{n}", f"yarn@{n}")
        return all(m[f"yarn@{n}"] < m[f"linear@{n}"] for n in TIMES if f"yarn@{n}" in m), m

    def flat() -> tuple[bool, dict[str, float]]:
        m = {f"{a}: {n}x": r.mean(a, f"x{n}/nll_beyond") for a in ("alibi", "truncation") for n in (2, 8)}
        return all(m[f"alibi: {n}x"] - m[f"truncation: {n}x"] <= 0.1 for n in (2, 8)), m

    def fails() -> tuple[bool, dict[str, float]]:
        m = {f"{a}: 8x": r.mean(a, "x8/nll_beyond") for a in ("nope", "truncation")}
        return m["nope: 8x"] - m["truncation: 8x"] > 0.5, m

    found = [
        claim("(a) at 2x the trained length the model as it is is > 0.5 nats worse than a fresh context", needed),
        claim("(b) at 2x: as it is > interpolation > NTK >= the better of dynamic NTK and YaRN", order),
        claim("(c) at every length YaRN is better than interpolation with the same factor, both untrained", parts),
        claim("(d) ALiBi stays within 0.1 nats of a fresh context up to 8x", flat),
        claim("(e) without positions the model is > 0.5 nats worse than a fresh context at 8x", fails),
    ]
    return found
