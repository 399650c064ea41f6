"""SGD-SaI (arXiv 2412.11768): SGD with momentum keeps up with AdamW once every tensor has its own fixed rate.

Hypothesis: with one scale per tensor, the first gradient's signal-to-noise ratio, SGD with momentum reaches AdamW's
loss on a decoder trained from scratch, with half of Adam's memory; without it, it does not. The paper: GPT-2 and ViT-S
level with AdamW, 5.93 GB (GPT-2 1.5B) and 25.15 GB (Llama-2-7B) saved in float32.

Control: the ratio is sqrt(n - 1) for a gradient of mean 0, so `sqrt_numel` sets it to sqrt(n) without looking at any
gradient. If it does as well, the effect is the size of tensors, not their gradients.

Expected, in held-out nats per token: SGD-SaI within 0.05 of AdamW; SGD at least 0.1 behind SGD-SaI; `sqrt_numel` close
to SGD-SaI. Cost on 2 CPU cores: ``:smoke`` seconds, ``:laptop`` (0.5 M parameters, 600 steps, 3 seeds) about 15
minutes, the sweep ``tune`` about 25. ``:gpu`` is 124 M parameters for 4,000 steps, ``:paper`` GPT-2's size on
OpenWebText; neither has been run.

Tuning: ``python -m experiments.sweep --config=configs/sgd_sai.py --sweep=tune`` tries five learning rates per arm, half
a decade apart, on a seed of its own and with other books held out; the rates below are its best, none of them at an
end of its grid (``results/sgd_sai/tuning.csv``). All arms share the
cosine schedule with 10 % warm-up, clipping at 1 and the decay that the arm's paper uses. Between the points of that
grid, and the decay with the rate: ``--search=optuna --sweep=sgd_sai --trials=20 --arms=sgd_sai
--minimise=sgd_sai:training/nll``, about a minute per trial at ``:laptop``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = tuple({"step": "train", "arm": arm, "topology": "v5e:4x4"} for arm in ("adamw", "sgd_sai"))

# Five rates per arm, the same factor apart, around each optimizer's usual one.
GRID = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (0.1, 0.3, 1.0, 3.0, 10.0),
    "sgd_sai": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sqrt_numel": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
BEST = {"adamw": 1e-2, "sgd": 1.0, "sgd_sai": 1e-2, "sqrt_numel": 1e-2}

PLUGS: dict[str, dict[str, Any]] = {
    "adamw": {"train.optimizer.name": "adamw", "train.optimizer.weight_decay": 0.1},
    "sgd": {"train.optimizer.name": "sgd", "train.optimizer.weight_decay": 0.0},
    "sgd_sai": {"train.optimizer.name": "sgd_sai", "train.optimizer.weight_decay": 1e-2},
    "sqrt_numel": {
        "train.optimizer.name": "sgd_sai",
        "train.optimizer.weight_decay": 1e-2,
        "train.optimizer.scale": "sqrt_numel",
    },
}


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "sgd_sai"
    c.scale = scale
    c.paper = {
        "title": "No More Adam: Learning Rate Scaling at Initialization is All You Need",
        "arxiv": "2412.11768",
        "claim": "SGD with momentum and a scale per tensor fixed at the first step matches AdamW with half its memory",
        "numbers": {
            "ViT-S/16, ImageNet-1K top-1": "AdamW 73.04, SGD-SaI 72.92",
            "optimizer memory saved, Llama-2-7B": "25.15 GB",
            "optimizer memory saved, GPT-2 XL": "5.93 GB",
        },
    }
    c.checkpoint = "random"
    c.baseline = "adamw"
    c.seeds = (0, 1, 2)
    size = {"smoke": "smoke", "laptop": "study", "gpu": "gpu", "paper": "gpu"}[scale]
    c.model, c.train = small.model(size), small.train(size)
    if scale == "smoke":
        c.seeds = (0,)
    elif scale == "paper":
        c.model = {
            "vocab_size": 50304,
            "d_model": 1600,
            "n_layers": 48,
            "n_heads": 25,
            "d_ff": 6400,
            "max_positions": 1024,
            "norm": "layernorm",
            "ffn": "gelu",
            "positions": {"name": "learned", "size": 1024},
            "dtype": "bfloat16",
            "remat": True,
        }
        c.train = {
            **small.train("gpu"),
            "steps": 100_000,
            "batch": 480,
            "data": {"texts": ("hf:Skylion007/openwebtext",), "tokenizer": "bpe:50257", "seq_len": 1024},
            "accumulate": 6,
            "mesh": {"data": 1, "fsdp": -1},
        }
    c.train["schedule"] = {"name": "cosine", "warmup": 0.1, "final": 0.1}
    c.train["clip"] = 1.0
    c.measures = {"training": {"name": "train_log"}}
    arms = {name: {**plug, "train.optimizer.learning_rate": BEST[name]} for name, plug in PLUGS.items()}
    c.arms = ConfigDict(arms, allow_dotted_keys=True)
    return c


def sweep_tune() -> Iterator[dict[str, Any]]:
    """Five points; each gives every arm its next rate."""
    for i in range(5):
        rates = {f"arms.{arm}.train.optimizer.learning_rate": rates[i] for arm, rates in GRID.items()}
        yield {"seeds": (100,), "train.data.split_seed": 1, **rates}


def search_sgd_sai(trial: Any) -> dict[str, Any]:
    """SGD-SaI's rate, over the decades of its grid, and its decay together, on the text that `sweep_tune` tunes on."""
    rates, optimizer = GRID["sgd_sai"], "arms.sgd_sai.train.optimizer"
    return {
        "seeds": (100,),
        "train.data.split_seed": 1,
        f"{optimizer}.learning_rate": trial.suggest_float("learning_rate", min(rates), max(rates), log=True),
        f"{optimizer}.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
    }


def claims(r: Results) -> list[Claim]:
    def nll(*arms: str) -> dict[str, float]:
        return {f"{a}, nats per token": r.mean(a, "training/nll") for a in arms}

    def level() -> tuple[bool, dict[str, float]]:
        m = nll("adamw", "sgd_sai")
        return m["sgd_sai, nats per token"] - m["adamw, nats per token"] <= 0.05, m

    def needed() -> tuple[bool, dict[str, float]]:
        m = nll("sgd", "sgd_sai")
        return m["sgd, nats per token"] - m["sgd_sai, nats per token"] >= 0.1, m

    def ratio() -> tuple[bool, dict[str, float]]:
        m = nll("sqrt_numel", "sgd_sai")
        noise = max(r.std("sqrt_numel", "training/nll"), r.std("sgd_sai", "training/nll"))
        gap = m["sqrt_numel, nats per token"] - m["sgd_sai, nats per token"]
        return gap > 2 * noise, {**m, "larger standard deviation over seeds": noise}

    def memory() -> tuple[bool, dict[str, float]]:
        mib = {f"{a}, MiB": r.mean(a, "training/optimizer_mib") for a in ("adamw", "sgd_sai")}
        share = mib["sgd_sai, MiB"] / mib["adamw, MiB"]
        return share <= 0.505, {**mib, "share": share}

    return [
        claim("(a) SGD-SaI ends within 0.05 nats per token of AdamW or below it", level, paper="72.92 against 73.04 %"),
        claim("(b) SGD with momentum alone ends at least 0.1 nats per token behind SGD-SaI", needed),
        claim("(c) SGD-SaI beats its control sqrt(numel) by more than two standard deviations over seeds", ratio),
        claim("(d) SGD-SaI's optimizer state is half of AdamW's", memory, paper="half; 25.15 GB less for Llama-2-7B"),
    ]
