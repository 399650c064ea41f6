"""LongHeads (arXiv 2402.10685): every head reads the chunks it needs, a trained length's worth, from a longer text.

Hypothesis: SmolLM2-135M (rotary, trained at 8,192 tokens) under LongHeads stays fluent past its trained length, finds
pass keys there that full attention, a window, LM-Infinite and NTK-aware scaling do not, and reads a text in time that
grows about linearly, without training. The paper reports 100 % pass keys at 128k for Llama-2-7B; a model of 135M
parameters need not have heads whose chunk vectors find the key, so how often heads see its chunk is measured beside.

The attention length is 2,048 tokens (16 chunks of 128, the paper's 16 chunks) at ``:laptop`` and ``:long``, a quarter
of the trained length, because on a CPU the cost of a token is proportional to it; ``:gpu`` and ``:paper`` take the
trained length. ``:small`` is a model of 5.8M parameters trained here at 256 tokens, with chunks of 16.

Expected: LongHeads within 0.1 nats of a fresh context beyond 1.3 times the trained length; exponent of reading time at
most 1.1 from 4k to 64k tokens. Measured at ``:laptop``: fluent past the trained length (0.084 nats behind a fresh
context, full attention 1.6), but no pass key found beyond it, by any arm. Reading grows with exponent 1.19 (full 1.68):
attention to the picked chunks is linear, but the first 2,048 tokens are read by full attention, cheaply, and every
query scores and ranks all chunks, of which a longer text has more. Heads see the key's chunk in 0.19 of all cases
against 0.15 by chance, but those of layer 20 in 0.64. At ``:small``, eight times the trained length, LongHeads is
0.007 nats behind a fresh context, full attention 0.26, NTK 0.13.

Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` under 25 minutes, ``:small`` about 10 (half of it training),
``:long`` about 2 hours. ``:gpu`` under 25 minutes on one 80 GB GPU, not run. ``:paper`` is Llama-2-7B at 32k tokens; it
needs that checkpoint.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "small", "long", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = (
    *({"step": "decode", "arm": arm, "topology": "v5e:2x4", "length": 32768} for arm in ("full", "longheads")),
    {"step": "prefill", "arm": "longheads", "topology": "v5e:2x4", "length": 32768},
)
RIVALS = ("full", "window", "lm_infinite", "ntk")
COST = (4096, 8192, 16384, 32768, 65536)


def _arms(trained: int, factor: float, chunk: int, attention_length: int) -> dict[str, dict[str, Any]]:
    every = ("nll", "passkey", "prefill", "decode")
    return {
        "full": {"model.pattern.name": "causal", "only": every},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": trained, "only": every},
        "lm_infinite": {
            "model.pattern.name": "lm_infinite",
            "model.pattern.window": trained,
            "model.pattern.sinks": 10,
            "model.pattern.ceiling": float(trained),
            "only": every,
        },
        "ntk": {
            "model.positions.scaling.name": "ntk",
            "model.positions.scaling.factor": factor,
            "only": ("nll", "passkey"),  # costs what `full` costs
        },
        "longheads": {
            "model.pattern.name": "longheads",
            "model.pattern.chunk": chunk,
            "model.pattern.attention_length": attention_length,
        },
        # The text's own difficulty: the same tokens read with a fresh context inside the trained length.
        "truncation": {"measures.nll.context": trained, "only": ("nll",)},
    }


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "longheads"
    c.scale = scale
    c.paper = {
        "title": "LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        "arxiv": "2402.10685",
        "claim": "without training, heads that each pick a few chunks read long texts in linear time",
        "numbers": {
            "Llama-2-7B, pass keys at 128k": "100 %",
            "Llama-2-7B, GPU memory with the cache in host memory": "26.51 GB at 64k, 44.48 GB at 128k",
        },
    }
    c.checkpoint = "smollm2-135m"
    c.baseline = "full"
    c.seeds = (0,)
    nll: dict[str, Any] = {"name": "nll_by_position", "bin": 512}
    passkey: dict[str, Any] = {"name": "passkey", "filler": "python-docs"}
    choice: dict[str, Any] = {"name": "chunk_choice", "filler": "python-docs"}
    prefill: dict[str, Any] = {"name": "prefill_cost", "lengths": COST, "layers": 1}
    decode: dict[str, Any] = {"name": "decode_cost", "lengths": COST}
    arms = _arms(8192, 4.0, 128, 2048)
    if scale == "smoke":
        c.checkpoint = "random"
        c.model = {"vocab_size": 258, "max_positions": 64, "d_model": 32, "d_ff": 64, "n_kv_heads": 2}
        nll.update(texts=("python-docs",), tokens=192, bin=32)
        passkey.update(lengths=(256,), depths=(0.5,))
        choice.update(lengths=(256,), depths=(0.5,))
        prefill.update(lengths=(64, 128))
        decode.update(lengths=(64, 128), steps=2)
        arms = _arms(64, 4.0, 8, 64)
    elif scale == "laptop":
        nll.update(texts=("kjv:Genesis", "python-docs"), tokens=12288)
        passkey.update(lengths=(4096, 16384), depths=(0.25, 0.75))
        choice.update(lengths=(16384,), depths=(0.25, 0.75))
        decode.update(lengths=(4096, 16384, 65536))
        arms["window"]["only"] = ("nll", "prefill")
    elif scale == "small":
        c.checkpoint = "random"
        c.model, c.train = small.model("laptop"), small.train("laptop")
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "kjv:Isaiah"), tokens=2048, bin=64)
        arms = {name: {**arm, "only": ("nll",)} for name, arm in _arms(256, 8.0, 16, 256).items()}
    elif scale == "long":
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=32768)
        passkey.update(lengths=(4096, 16384, 32768), depths=(0.1, 0.5, 0.9))
        choice.update(lengths=(16384, 32768), depths=(0.1, 0.5, 0.9))
    elif scale == "gpu":
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=32768)
        passkey.update(lengths=(4096, 16384, 32768), depths=(0.1, 0.3, 0.5, 0.7, 0.9), trials=2)
        choice.update(lengths=(16384, 32768), depths=(0.1, 0.5, 0.9))
        prefill.update(repeats=3)
        arms = _arms(8192, 4.0, 256, 8192)
    elif scale == "paper":
        c.checkpoint = "checkpoints/Llama-2-7b-hf"
        c.architecture, c.model = "llama2_7b", {"dtype": "bfloat16"}
        nll.update(texts=("kjv:Genesis", "kjv:Psalms", "python-docs"), tokens=32768)
        passkey.update(lengths=(4096, 8192, 16384, 32768), trials=20)
        choice.update(lengths=(16384, 32768))
        arms = _arms(4096, 8.0, 256, 4096)
    measures = {"nll": nll, "passkey": passkey, "choice": choice, "prefill": prefill, "decode": decode}
    c.measures = {"nll": nll} if scale == "small" else measures
    c.arms = ConfigDict(arms, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def fluent() -> tuple[bool, dict[str, float]]:
        control = r.mean("truncation", "nll/nll_beyond")
        measured = {f"{a}: beyond": r.mean(a, "nll/nll_beyond") for a in ("full", "longheads")}
        holds = measured["full: beyond"] - control > 0.5 and measured["longheads: beyond"] - control <= 0.1
        return holds, {**measured, "truncation: beyond": control}

    def retrieval() -> tuple[bool, dict[str, float]]:
        names = [a for a in (*RIVALS, "longheads") if r.has(a, "passkey/accuracy_beyond")]
        measured = {f"{a}: beyond": r.mean(a, "passkey/accuracy_beyond") for a in names}
        ours = measured["longheads: beyond"]
        rivals = [measured["full: beyond"], *(v for k, v in measured.items() if k != "longheads: beyond")]
        inside = {f"{a}: inside": r.mean(a, "passkey/accuracy_inside") for a in ("full", "longheads") if _inside(r, a)}
        return ours > max(rivals), {**inside, **measured}

    def linear() -> tuple[bool, dict[str, float]]:
        ours = r.mean("longheads", "prefill/exponent")
        return ours <= 1.1, {"longheads": ours, "full": r.mean("full", "prefill/exponent")}

    def decoding() -> tuple[bool, dict[str, float]]:
        ours = r.mean("longheads", "decode/exponent")
        return ours <= 0.1, {"longheads": ours, "full": r.mean("full", "decode/exponent")}

    def choice() -> tuple[bool, dict[str, float]]:
        names = ("hit_rate", "chance", "best_head", "heads_above_half")
        measured = {name.replace("_", " "): r.mean("longheads", f"choice/{name}") for name in names}
        return measured["hit rate"] > 2 * measured["chance"], measured

    return [
        claim(
            "(a) on the same tokens beyond 1.3x the trained length, full attention is > 0.5 nats worse and LongHeads "
            "at most 0.1 nats worse than a fresh context within the trained length",
            fluent,
            paper="the best perplexity among methods that restrict attention (no figures)",
        ),
        claim(
            "(b) beyond the trained length LongHeads retrieves more pass keys than full attention, a window, "
            "LM-Infinite and NTK-aware scaling, those of them measured",
            retrieval,
            paper="100 % at 128k",
        ),
        claim(
            "(c) the time to read a text grows as its length to a power of at most 1.1",
            linear,
            paper="linear",
        ),
        claim("(d) the time of a decoded token grows as the length to a power of at most 0.1", decoding),
        claim(
            "(e) heads see the chunk with the key more than twice as often as with random picks",
            choice,
        ),
    ]


def _inside(r: Results, arm: str) -> bool:
    return r.has(arm, "passkey/accuracy_inside")
