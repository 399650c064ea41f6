"""Weights in int8 (LLM.int8(), arXiv 2208.07339): rounding every matrix to 8 bits costs a model next to nothing.

Hypothesis: with one scale per output (absolute maximum, nothing calibrated), weights in int8 and activations as they
are, the loss of SmolLM2-135M stays within 0.01 nats per token of float32's. The paper, with activations in int8 too and
its outlier columns in float16: perplexity on C4 25.65 and 25.83 at 125M parameters, which is 0.007 nats, and no loss at
13B. Weights alone should lose less; the table of tokens, which is also the head, should be a part of it, not all.

Two texts of 2,048 tokens, within the trained length, every token scored by all arms. Nothing is random, so that one
seed is all there is; two documents give no interval. Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` 3 minutes.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop")


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "int8"
    c.scale = scale
    c.paper = {
        "title": "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        "arxiv": "2208.07339",
        "claim": "inference in int8 without loss of performance, up to 175B parameters",
        "numbers": {"C4, perplexity, 125M": "float32 25.65, LLM.int8() 25.83"},
    }
    c.checkpoint = "smollm2-135m"
    c.baseline = "full"
    c.seeds = (0,)
    nll: dict[str, Any] = {"name": "nll_by_position", "texts": ("kjv:Genesis", "python-docs"), "tokens": 2048}
    if scale == "smoke":
        c.checkpoint = "random"
        c.model = {"vocab_size": 258, "max_positions": 64, "d_model": 32, "d_ff": 64, "n_kv_heads": 2}
        nll.update(texts=("python-docs",), tokens=64, bin=32)
    c.measures = {"nll": nll}
    c.arms = {
        "full": {},
        "int8": {"surgery": ("int8",)},
        "int8_keep_head": {"surgery": ({"name": "int8", "keep": ("embed",)},)},
    }
    return c


def claims(r: Results) -> list[Claim]:
    def lost(*arms: str) -> dict[str, float]:
        full = r.mean("full", "nll/nll_inside")
        return {f"{a} - full, nats per token": r.mean(a, "nll/nll_inside") - full for a in arms}

    def level() -> tuple[bool, dict[str, float]]:
        m = lost("int8")
        return max(m.values()) <= 0.01, m

    def head() -> tuple[bool, dict[str, float]]:
        m = lost("int8", "int8_keep_head")
        return m["int8_keep_head - full, nats per token"] < m["int8 - full, nats per token"], m

    return [
        claim("(a) weights in int8 lose at most 0.01 nats per token", level, paper="0.007 with activations in int8"),
        claim("(b) with the table of tokens and outputs as it is they lose less", head),
    ]
