"""LM-Infinite (arXiv 2308.16137): a real pretrained model stays fluent past the length it was trained at.

Hypothesis: SmolLM2-135M (rotary, trained at 8,192 tokens) loses fluency beyond about 1.3 times that length under full
attention, and keeps it under the Λ-shaped mask with a distance ceiling, with the same parameters and no training. The
paper's effect sizes are for 7B models: Llama-2 goes from perplexity 3.8 inside to NaN at 4x, with LM-Infinite 4.2.

Expected: full attention more than 0.5 nats per token worse beyond 10,650 tokens than inside; LM-Infinite within 0.1.
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` under 8 minutes, ``:long`` (all arms, all tokens, passkey, decoding
cost: the committed result) under 90 minutes. ``:gpu`` under 25 minutes on one 80 GB GPU. ``:paper`` is Llama-2-7B at
32k tokens; it needs that checkpoint.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "long", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = (
    *(
        {"step": "decode", "arm": arm, "topology": "v5e:2x4", "length": 32768}
        for arm in ("full", "window", "lm_infinite")
    ),
    *({"step": "prefill", "arm": arm, "topology": "v5e:2x4", "length": 32768} for arm in ("full", "lm_infinite")),
)

# The paper's constants (section 4.1 and the authors' code): window = ceiling = trained length, 10 sinks, k = 5 from the
# 5th layer, inserted at half the trained length.
SINKS = 10


def _arms(trained: int, factor: float) -> dict[str, dict[str, Any]]:
    lm_infinite = {
        "model.pattern.name": "lm_infinite",
        "model.pattern.window": trained,
        "model.pattern.sinks": SINKS,
        "model.pattern.ceiling": float(trained),
    }
    return {
        "full": {"model.pattern.name": "causal"},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": trained},
        "sinks_window": {
            "model.pattern.name": "streaming",
            "model.pattern.window": trained,
            "model.pattern.sinks": SINKS,
            "model.pattern.sink_positions": "true",
        },
        "streaming": {
            "model.pattern.name": "streaming",
            "model.pattern.window": trained - 4,
            "model.pattern.sinks": 4,
        },
        "ntk": {"model.positions.scaling.name": "ntk", "model.positions.scaling.factor": factor},
        "yarn": {"model.positions.scaling.name": "yarn", "model.positions.scaling.factor": factor},
        "lm_infinite": lm_infinite,
        # Only the answer's tokens look for far keys, as in the authors' code: NLL and cost are those of `lm_infinite`.
        "lm_infinite_topk": {
            **lm_infinite,
            "model.pattern.top_k": 5,
            "model.pattern.top_k_from_layer": 4,
            "model.pattern.top_k_queries": 5,
            "only": ("passkey",),
        },
        # The text's own difficulty: the same tokens read with a fresh context inside the trained length.
        "truncation": {
            "measures.nll.context": trained,
            "measures.passkey.context": trained,
            "only": ("nll", "passkey"),
        },
    }


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "lm_infinite"
    c.scale = scale
    c.paper = {
        "title": "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models",
        "arxiv": "2308.16137",
        "claim": "without training, a Λ-mask and a distance ceiling keep perplexity flat beyond the trained length",
        "numbers": {
            "Llama-2-7B, ArXiv, perplexity at 4K / 16K / 32K": "vanilla 3.8 / NaN / NaN; LM-Infinite 3.6 / 4.2 / 6.5",
            "Llama-2-7B-chat passkey 6K-16K": "truncation 44.0 %, LM-Infinite with top-k 81.2 %",
            "decoding at 32K": "2.7x faster, 7.5x less memory",
        },
    }
    c.checkpoint = "smollm2-135m"
    c.baseline = "full"
    c.seeds = (0,)
    nll: dict[str, Any] = {"name": "nll_by_position", "bin": 512}
    passkey: dict[str, Any] = {"name": "passkey", "filler": "python-docs"}
    decode: dict[str, Any] = {"name": "decode_cost"}
    arms = _arms(8192, 2.0)
    if scale == "smoke":
        c.checkpoint = "random"
        c.model = {"vocab_size": 258, "max_positions": 64, "d_model": 32, "d_ff": 64, "n_kv_heads": 2}
        nll.update(texts=("python-docs",), tokens=192, bin=32)
        passkey.update(lengths=(256,), depths=(0.5,))
        decode.update(lengths=(64, 128), steps=2)
        arms = _arms(64, 2.0)
    elif scale == "laptop":
        nll.update(texts=("kjv:Genesis", "python-docs"), tokens=12288)
        arms = {k: arms[k] for k in ("full", "lm_infinite")}
        arms["truncation"] = {"measures.nll.context": 8192}
    elif scale == "long":
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=14336)
        passkey.update(lengths=(4096, 12288), depths=(0.1, 0.5, 0.9))
        decode.update(lengths=(1024, 4096, 8192, 16384, 32768, 65536))
    elif scale == "gpu":
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=32768)
        passkey.update(lengths=(4096, 8192, 12288, 16384, 32768), depths=(0.1, 0.3, 0.5, 0.7, 0.9), trials=4)
        decode.update(lengths=(1024, 4096, 8192, 16384, 32768, 65536, 131072))
        arms = _arms(8192, 4.0)
    elif scale == "paper":
        c.checkpoint = "checkpoints/Llama-2-7b-hf"
        c.architecture, c.model = "llama2_7b", {"dtype": "bfloat16"}
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=32768)
        passkey.update(lengths=(6144, 8192, 10240, 12288, 16384), trials=20)
        decode.update(lengths=(4096, 32768))
        arms = _arms(4096, 8.0)
    c.measures = {"nll": nll} if scale == "laptop" else {"nll": nll, "passkey": passkey, "decode": decode}
    c.arms = ConfigDict(arms, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def fluent() -> tuple[bool, dict[str, float]]:
        full, ours = r.mean("full", "nll/nll_gap"), r.mean("lm_infinite", "nll/nll_gap")
        return full > 0.5 and abs(ours) <= 0.1, {"full: beyond - inside": full, "lm_infinite: beyond - inside": ours}

    def same_text() -> tuple[bool, dict[str, float]]:
        control = r.mean("truncation", "nll/nll_beyond")
        measured = {f"{a}: beyond": r.mean(a, "nll/nll_beyond") for a in ("full", "lm_infinite")}
        holds = measured["full: beyond"] - control > 0.5 and measured["lm_infinite: beyond"] - control <= 0.1
        return holds, {**measured, "truncation: beyond": control}

    def retrieval() -> tuple[bool, dict[str, float]]:
        names = [a for a in r.arms if r.has(a, "passkey/accuracy_beyond")]
        measured = {f"{a}: beyond": r.mean(a, "passkey/accuracy_beyond") for a in names}
        best = measured["lm_infinite_topk: beyond"]
        rivals = [measured[f"{a}: beyond"] for a in ("full", "truncation")]
        inside = {"full: inside": r.mean("full", "passkey/accuracy_inside")} if _inside(r) else {}
        return best > max(rivals), {**inside, **measured}

    def decoding() -> tuple[bool, dict[str, float]]:
        full, ours = r.mean("full", "decode/ms@32768"), r.mean("lm_infinite", "decode/ms@32768")
        mib = r.mean("full", "decode/cache_mib@32768") / r.mean("lm_infinite", "decode/cache_mib@32768")
        return full / ours >= 2.72, {
            "full, ms": full,
            "lm_infinite, ms": ours,
            "times faster": full / ours,
            "times smaller": mib,
        }

    def eight_windows() -> tuple[bool, dict[str, float]]:
        full, ours = r.mean("full", "decode/ms@65536"), r.mean("lm_infinite", "decode/ms@65536")
        return full / ours >= 2.72, {"full, ms": full, "lm_infinite, ms": ours, "times faster": full / ours}

    def flat() -> tuple[bool, dict[str, float]]:
        at = {n: r.mean("lm_infinite", f"decode/ms@{n}") for n in (8192, 16384, 32768)}
        mib = {n: r.mean("lm_infinite", f"decode/cache_mib@{n}") for n in (16384, 32768)}
        told = {f"{n} tokens, ms": ms for n, ms in at.items()}
        holds = max(at.values()) <= 1.1 * min(at.values()) and mib[16384] == mib[32768]
        return holds, {**told, "cache, MiB": mib[32768]}

    return [
        claim(
            "(a) beyond 1.3x the trained length full attention is > 0.5 nats worse than inside it, while LM-Infinite "
            "stays within 0.1 nats (mean over documents)",
            fluent,
            paper="Llama-2-7B perplexity 3.8 inside, NaN at 4x; LM-Infinite 4.2",
        ),
        claim(
            "(a') on the same tokens beyond 1.3x, full attention is > 0.5 nats worse and LM-Infinite at most 0.1 nats "
            "worse than a fresh context within the trained length",
            same_text,
        ),
        claim(
            "(b) beyond the trained length LM-Infinite with top-k retrieves more pass keys than full attention and "
            "than truncation",
            retrieval,
            paper="81.2 % against 0 % and 44.0 %",
        ),
        claim("(c) at 32k tokens decoding is >= 2.72x faster than with the full cache", decoding, paper="2.72x"),
        claim("(c') at 64k tokens, 8 windows of this model as 32k are of the paper's, it is", eight_windows),
        claim("(d) from 8k, the window, to 32k tokens a token's time stays within 10 %, and the cache's size", flat),
    ]


def _inside(r: Results) -> bool:
    return r.has("full", "passkey/accuracy_inside")
