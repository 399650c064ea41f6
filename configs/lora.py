"""LoRA (arXiv 2106.09685): adapters of low rank learn what training every weight learns, with a fraction of the state.

Hypothesis: adapting a pretrained model to other text, LoRA ends within 0.05 nats per token of training all parameters;
more weight matrices at a lower rank do better than one matrix at a high rank for an equal number of parameters (the
paper's table 5). The paper: GPT-3 175B on WikiSQL 73.8 % trained whole, 73.4 to 74.0 % with 4.7 M to 37.7 M parameters.

SmolLM2-135M on the modules of Python's standard library; held-out modules are scored. Learning rates are the usual
ones, 2e-4 whole and 2e-3 for adapters, not tuned: ``--config.arms.ARM.train.optimizer.learning_rate=...`` changes one.
Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` (51 k tokens per arm) about 20 minutes; ``:gpu`` is 8 M tokens per
arm, ``:paper`` Llama-2-7B.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = tuple({"step": "train", "arm": arm, "topology": "v5e:4x4"} for arm in ("all_parameters", "lora_qv"))

ALL = ("*/attn/*/kernel", "*/ffn/*/kernel")
# `qv`, the paper's choice, and one matrix with the same number of parameters.
LORA: dict[str, dict[str, Any]] = {
    "lora_qv": {"train.surgery.targets": ("*/attn/q/kernel", "*/attn/v/kernel"), "train.surgery.rank": 8},
    "lora_all": {"train.surgery.targets": ALL, "train.surgery.rank": 8},
    "lora_q": {"train.surgery.targets": ("*/attn/q/kernel",), "train.surgery.rank": 14},
}


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "lora"
    c.scale = scale
    c.paper = {
        "title": "LoRA: Low-Rank Adaptation of Large Language Models",
        "arxiv": "2106.09685",
        "claim": "on par with training all parameters, with 10,000 times fewer trained ones (GPT-3 175B)",
        "numbers": {"GPT-3, WikiSQL": "all 73.8 %, LoRA 73.4 to 74.0 %", "optimizer state and gradients": "a third"},
    }
    c.checkpoint = {"smoke": "random", "paper": "checkpoints/Llama-2-7b-hf"}.get(scale, "smollm2-135m")
    c.baseline = "all_parameters"
    c.seeds = (0,)
    whole, adapters = 2e-4, 2e-3
    data = {"texts": ("python-source",), "tokenizer": "", "seq_len": 128, "held_out": 0.05}
    c.train = {"steps": 50, "batch": 8, "eval_every": 25, "eval_rows": 32, "final_rows": 64, "save_every": 50}
    if scale == "smoke":
        c.model, c.train = small.model("smoke"), small.train("smoke")
        data = dict(c.train["data"])
    elif scale == "gpu":
        c.model = {"dtype": "bfloat16", "remat": True}
        c.train.update(steps=1000, batch=8, eval_every=100, final_rows=256, save_every=500)
        data["seq_len"] = 1024
    elif scale == "paper":
        c.architecture, c.model = "llama2_7b", {"dtype": "bfloat16", "remat": True}
        c.train.update(steps=2000, batch=64, eval_every=100, final_rows=512, save_every=500)
        c.train.update(accumulate=4, mesh={"data": 1, "fsdp": -1})
        data["seq_len"] = 4096
    c.train["data"] = data
    c.train["optimizer"] = {"name": "adamw", "learning_rate": whole, "weight_decay": 0.0}
    c.train["schedule"] = {"name": "cosine", "warmup": 0.1, "final": 0.1}
    c.measures = {"training": {"name": "train_log"}}
    arms: dict[str, dict[str, Any]] = {"all_parameters": {}}
    for name, change in LORA.items():
        arms[name] = {"train.surgery.name": "lora", "train.optimizer.learning_rate": adapters, **change}
    if scale == "smoke":
        arms = {k: {**v, **({"train.surgery.rank": 2} if k != "all_parameters" else {})} for k, v in arms.items()}
    c.arms = ConfigDict(arms, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def nll(*arms: str) -> dict[str, float]:
        return {f"{a}, nats per token": r.mean(a, "training/nll") for a in arms}

    def level() -> tuple[bool, dict[str, float]]:
        m = nll("all_parameters", "lora_qv", "lora_all")
        best = min(v for k, v in m.items() if k.startswith("lora"))
        return best - m["all_parameters, nats per token"] <= 0.05, m

    def spread() -> tuple[bool, dict[str, float]]:
        m = nll("lora_qv", "lora_q")
        return m["lora_qv, nats per token"] < m["lora_q, nats per token"], m

    def state() -> tuple[bool, dict[str, float]]:
        mib = {f"{a}, MiB": r.mean(a, "training/optimizer_mib") for a in ("all_parameters", "lora_qv")}
        return mib["lora_qv, MiB"] <= mib["all_parameters, MiB"] / 50, mib

    return [
        claim("(a) LoRA ends within 0.05 nats per token of training all parameters", level, paper="73.8 and 74.0 %"),
        claim("(b) two matrices at rank 8 end below one matrix at rank 14 (as many parameters)", spread),
        claim("(c) the optimizer's state is at most a fiftieth", state),
    ]
