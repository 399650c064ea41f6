"""Pretraining from scratch: a small Llama on the default corpus, the base that other experiments compare with.

Hypothesis: none of a paper; this is the control. A decoder trained from random parameters on the King James Bible (66
books, 5 % of them held out whole) must come below 2 bits per byte on the held-out ones, with no step lost. Measured at
``:laptop`` (5.8 M parameters, 300 steps, 1.2 M tokens): 1.720 bits per byte.
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` about 5 minutes. ``:gpu`` (Wikipedia articles and the Python
library, 124 M parameters) under 25 minutes on one 80 GB GPU; ``:paper`` is Llama-2-7B at 4M tokens per step.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.bases import llama2_7b, small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = (
    {"step": "train", "arm": "base", "topology": "v5e:16x16"},
    {"step": "decode", "arm": "base", "topology": "v5e:2x2", "length": 4096, "batch": 8},
)


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "pretrain"
    c.scale = scale
    c.paper = {
        "title": "Llama 2: Open Foundation and Fine-Tuned Chat Models",
        "arxiv": "2307.09288",
        "claim": "the architecture and recipe this baseline follows; no number of the paper is tested",
    }
    c.checkpoint = "random"
    c.baseline = "base"
    c.seeds = (0,)
    c.model = small.model("laptop")
    c.train = small.train("laptop")
    nll: dict[str, Any] = {"name": "nll_by_position", "texts": ("python-docs",), "tokens": 256, "bin": 32}
    if scale == "smoke":
        c.model = small.model("smoke")
        c.train = small.train("smoke")
        nll.update(tokens=64, bin=16)
    elif scale == "gpu":
        c.model = small.model("gpu")
        c.train = small.train("gpu")
        nll.update(tokens=1024, bin=128)
    elif scale == "paper":
        c.model = llama2_7b.model()
        c.train = {
            **small.train("gpu"),
            "steps": 500_000,
            "batch": 1024,
            "schedule": {"name": "cosine", "warmup": 2000.0, "final": 0.1},
            "optimizer": {"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1, "b2": 0.95, "eps": 1e-5},
            "data": {"texts": ("tfds:c4/en",), "tokenizer": "checkpoints/Llama-2-7b-hf", "seq_len": 4096},
            "accumulate": 2,
            "mesh": {"data": 1, "fsdp": -1},
        }
        nll.update(tokens=4096, bin=256)
    c.measures = {"training": {"name": "train_log"}, "nll": nll}
    c.arms = ConfigDict({"base": {}}, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def learns() -> tuple[bool, dict[str, float]]:
        bpb = r.mean("base", "training/bits_per_byte")
        return bpb < 2.0, {"held-out bits per byte": bpb}

    def steady() -> tuple[bool, dict[str, float]]:
        skipped = r.mean("base", "training/skipped")
        return skipped == 0, {"skipped steps": skipped}

    return [
        claim("held-out books cost less than 2.0 bits per byte", learns),
        claim("no step had to be skipped", steady),
    ]
