"""Fine-tuning on conversations: the example to copy, and the control that a trained answer is one that was learned.

Hypothesis: none of a paper. Of every conversation the assistant's answers alone are learned (`train.data.learn`), each
with the token that ends it. On 42 short ones (``configs/talks.jsonl``: days, months, sums, opposites) SmolLM2-135M with
adapters of rank 8 must come below 0.5 nats per token on the answers of those held out, with no step lost; it was not
measured before this was written. ``:smoke`` trains a small model of its own on their bytes for the path alone.
Rows of yours: ``--config.train.data.texts=talks.jsonl`` (or a Parquet file, ``hf:NAME``, ``s3://…``); a checkpoint of
yours with its own template: ``--config.checkpoint=FOLDER --config.train.data.template=``.
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` (30 steps of 1 k tokens) about 5 minutes; ``:gpu`` is 16 M tokens
of any rows, in minutes on one 80 GB GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "gpu")
TALKS = Path(__file__).with_name("talks.jsonl")


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "chat"
    c.scale = scale
    c.paper = {
        "title": "Fine-tuning on conversations",
        "claim": "answers are learned; no number of a paper is tested",
    }
    c.checkpoint = "random" if scale == "smoke" else "smollm2-135m"
    c.baseline = "answers"
    c.seeds = (0,)
    data: dict[str, Any] = {
        "texts": (os.path.relpath(TALKS),),
        "kind": "chat",
        "template": "chatml",
        "learn": "answers",
        "tokenizer": "",
        "seq_len": 128,
        "packing": "best_fit",
        "overlong": "truncate",
        "held_out": 0.2,
    }
    c.train = {"steps": 30, "batch": 8, "eval_every": 10, "eval_rows": 16, "final_rows": 16, "save_every": 30}
    c.train["surgery"] = {"name": "lora", "rank": 8}
    c.train["optimizer"] = {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.0}
    c.train["schedule"] = {"name": "cosine", "warmup": 0.1, "final": 0.1}
    if scale == "smoke":
        c.model = {**small.model("smoke"), "max_positions": 128}
        c.train = small.train("smoke")
        data["tokenizer"] = "bytes"
    elif scale == "gpu":
        c.model = {"dtype": "bfloat16", "remat": True}
        c.train.update(steps=500, batch=16, eval_every=50, eval_rows=64, final_rows=512, save_every=250)
        data.update(seq_len=2048, held_out=0.02)
    c.train["data"] = data
    c.measures = {"training": {"name": "train_log"}}
    c.arms = ConfigDict({"answers": {}}, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def learns() -> tuple[bool, dict[str, float]]:
        nll = r.mean("answers", "training/nll")
        return nll < 0.5, {"answers held out, nats per token": nll}

    def steady() -> tuple[bool, dict[str, float]]:
        skipped = r.mean("answers", "training/skipped")
        return skipped == 0, {"skipped steps": skipped}

    return [
        claim("answers of held-out conversations cost less than 0.5 nats per token", learns),
        claim("no step had to be skipped", steady),
    ]
