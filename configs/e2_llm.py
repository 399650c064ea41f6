"""E2-LLM (arXiv 2401.06951): one training on short rows, whose positions are scaled and shifted at random, serves every
longer window by interpolation.

Hypothesis: after a short training with positions ``(m + t) / g`` a model reads 2, 4 and 8 times its length, each by
linear interpolation of that factor, at least as well as a model trained for that very length and factor (position
interpolation, arXiv 2306.15595), and much better than interpolation without training. The paper, Llama-2-13B, LongBench
average at 32k: 41.74, against 37.65 for interpolation tuned at 16k on the same data; perplexity at the short length
1 to 5 % above the original's (2.96 to 3.06 against 2.92).

Measured at ``:laptop``, bits per byte at 2 / 4 / 8 times the length: one training 1.404 / 1.493 / 1.541, tuned for each
length 1.394 / 1.476 / 1.489, untrained interpolation 1.508 / 1.757 / 1.896, YaRN 1.415 / 1.514 / 1.535; at the trained
length 1.433 for 1.369. So it does most of what tuning for a length does, but not all, and at 8 times YaRN is as good
without training. Offsets change nothing (1.539 without): rotary attention sees differences of positions alone, and only
the distance to the first tokens differs.

Measured at ``:smollm2`` (one seed, two texts), bits per byte at 2 times the length: E2-LLM 0.939, rows without
augmentation 1.124, untrained interpolation 1.184, NTK 0.818, YaRN 0.814; at the trained length 0.772 for 0.744. Forty
steps of adapters on 1,024 tokens win back half of what interpolation loses; YaRN, untrained, is still better there.

A Llama of 1.0 M parameters trained at 128 tokens, then 300 steps more: with the augmentation, with scales but no
offsets, with neither, and tuned at each target length (rows that long, as many tokens a step). All parameters are
trained. ``:smollm2`` trains LoRA adapters of SmolLM2-135M on rows of 1,024 tokens and reads 16k tokens (2x).
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` (3 seeds) about 20 minutes, ``:smollm2`` about 32. ``:gpu`` is
124 M parameters at 1,024 tokens; ``:paper`` Llama-2-7B, 30,000 steps of 16 rows of 4k, read at 32k and 64k.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.bases import short, small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "smollm2", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = (
    {"step": "train", "arm": "e2@8", "topology": "v5e:4x4"},
    {"step": "decode", "arm": "e2@8", "topology": "v5e:2x4", "length": 32768},
)
TIMES = (2, 4, 8)


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "e2_llm"
    c.scale = scale
    c.paper = {
        "title": "E2-LLM: Efficient and Extreme Length Extension of Large Language Models",
        "arxiv": "2401.06951",
        "claim": "one training on short texts serves every window by changing the scale of positions alone",
        "numbers": {
            "Llama-2-13B, LongBench average, 32k": "E2-LLM 41.74, interpolation tuned at 16k 37.65",
            "Llama-2-7B, Proof-pile perplexity, 4k / 32k": "E2-LLM-32k 2.99 / 2.46, original 2.92 / -",
        },
    }
    c.checkpoint, c.baseline, c.seeds = "random", "base", (0, 1, 2)
    times: tuple[int, ...] = TIMES
    L, texts = short.LENGTH, short.books(short.READ)
    c.model, c.train = short.model(), short.train()
    tune: dict[str, Any] = {"steps": 300, "batch": 16, "rate": 3e-4}
    if scale == "smoke":
        L, texts, times = 64, ("kjv:Genesis",), (2,)
        c.seeds, c.model, c.train = (0,), small.model("smoke"), small.train("smoke")
        tune.update(steps=2, batch=8, rate=1e-3)
    elif scale == "smollm2":
        L, texts, times = 8192, ("kjv:Genesis", "python-docs"), (2,)
        c.checkpoint, c.seeds, c.model = "smollm2-135m", (0,), {}
        c.train = {
            "steps": 40,
            "batch": 4,
            "eval_every": 0,
            "final_rows": 16,
            "save_every": 20,
            "data": {"texts": ("wikipedia",), "tokenizer": "", "seq_len": 1024, "held_out": 0.05},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup": 0.1, "final": 0.1},
            "surgery": {"name": "lora", "targets": ("*/attn/*/kernel", "*/ffn/*/kernel"), "rank": 8},
        }
    elif scale == "gpu":
        L = 1024
        c.model, c.train = small.model("gpu"), small.train("gpu")
        tune.update(steps=600, batch=64, rate=5e-5)
    elif scale == "paper":
        L, texts, times = 4096, ("kjv:Genesis", "kjv:Psalms"), (8, 16)
        c.checkpoint, c.seeds = "checkpoints/Llama-2-7b-hf", (0,)
        c.architecture, c.model = "llama2_7b", {"dtype": "bfloat16", "remat": True}
        c.train = {
            "steps": 30_000,
            "batch": 16,
            "data": {"texts": ("tfds:c4/en",), "tokenizer": "", "seq_len": 4096},
            "optimizer": {"name": "adamw", "learning_rate": 1e-5, "b1": 0.9, "b2": 0.95},
            "schedule": {"name": "constant"},
            "mesh": {"data": 1, "fsdp": -1},
        }
    c.measures = {
        f"x{n}": {
            "name": "nll_by_position",
            "texts": texts,
            "tokens": n * L,
            "trained": L if n > 1 else n * L,
            "bin": max(n * L // 32, 4),
        }
        for n in (1, *times)
    }
    if c.checkpoint == "random":
        arms = _tuned_here(L, times, tune)
    else:
        arms = _of_a_checkpoint(times, g_max=4 if scale == "smollm2" else 20)
    c.arms = ConfigDict(arms, allow_dotted_keys=True)
    return c


def _scaling(name: str, n: int) -> dict[str, Any]:
    return {"model.positions.scaling.name": name, "model.positions.scaling.factor": float(n), "only": (f"x{n}",)}


def _zero_shot(times: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    return {f"{name}@{n}": _scaling(name, n) for n in times for name in ("linear", "ntk", "yarn")}


def _tuned_here(L: int, times: tuple[int, ...], tune: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`base` is trained at L, the others after `base` start from it."""
    more = {
        "starts_from": "base",
        "train.steps": tune["steps"],
        "train.batch": tune["batch"],
        "train.optimizer.learning_rate": tune["rate"],
    }
    e2 = {"train.augmentation.name": "e2_llm", "train.augmentation.g_max": max(times)}
    arms: dict[str, dict[str, Any]] = {"base": {}, **_zero_shot(times)}
    arms["e2@1"] = {**more, **e2, "only": ("x1",)}
    for n in times:
        arms[f"e2@{n}"] = {**more, **e2, **_scaling("linear", n)}
        arms[f"no_offset@{n}"] = {**more, **e2, "train.augmentation.max_offset": 0, **_scaling("linear", n)}
        arms[f"short_rows@{n}"] = {**more, **_scaling("linear", n)}
        arms[f"tuned@{n}"] = {
            **more,
            "trains": True,
            "train.data.seq_len": n * L,
            "train.batch": max(tune["batch"] // n, 8 if L == 64 else 2),
            **_scaling("linear", n),
        }
    return arms


def _of_a_checkpoint(times: tuple[int, ...], g_max: int) -> dict[str, dict[str, Any]]:
    e2 = {"train.augmentation.name": "e2_llm", "train.augmentation.g_max": g_max}
    arms: dict[str, dict[str, Any]] = {"base": {"untrained": True}}
    arms |= {name: {"untrained": True, **change} for name, change in _zero_shot(times).items()}
    arms["e2@1"] = {**e2, "only": ("x1",)}
    for n in times:
        arms[f"e2@{n}"] = {**e2, **_scaling("linear", n)}
        arms[f"short_rows@{n}"] = _scaling("linear", n)
    return arms


def claims(r: Results) -> list[Claim]:
    def measured(*arms: str) -> dict[str, float]:
        """Bits per byte of each arm over all tokens of its length."""
        return {a: r.mean(a, f"x{a.partition('@')[2]}/bits_per_byte") for a in arms}

    times = [n for n in (2, 4, 8, 16) if r.has(f"e2@{n}", f"x{n}/bits_per_byte")] or [2]

    def serves() -> tuple[bool, dict[str, float]]:
        m = measured(*(f"{a}@{n}" for n in times for a in ("e2", "tuned")))
        return all(m[f"e2@{n}"] <= m[f"tuned@{n}"] for n in times), m

    def untrained() -> tuple[bool, dict[str, float]]:
        m = measured(*(f"{a}@{n}" for n in times for a in ("e2", "linear", "ntk", "yarn")))
        return all(m[f"e2@{n}"] < min(m[f"{a}@{n}"] for a in ("linear", "ntk", "yarn")) for n in times), m

    def short_texts() -> tuple[bool, dict[str, float]]:
        m = {a: r.mean(a, "x1/bits_per_byte") for a in ("base", "e2@1")}
        return m["e2@1"] <= 1.05 * m["base"], m

    def parts() -> tuple[bool, dict[str, float]]:
        n = times[-1]
        m = measured(f"e2@{n}", f"no_offset@{n}", f"short_rows@{n}")
        return m[f"e2@{n}"] < min(m[f"no_offset@{n}"], m[f"short_rows@{n}"]), m

    return [
        claim(
            "(a) one training serves every length at least as well as interpolation tuned for that length",
            serves,
            paper="LongBench 41.74 against 37.65",
        ),
        claim("(b) and better than interpolation, NTK and YaRN without training", untrained),
        claim(
            "(c) at the trained length it costs at most 5 % of bits per byte",
            short_texts,
            paper="1 to 5 % of perplexity",
        ),
        claim("(d) at the longest, it is better than without offsets, and than without augmentation", parts),
    ]
