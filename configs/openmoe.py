"""OpenMoE (arXiv 2402.01739): what a mixture of experts routes by, when it decides, and whom it drops.

Hypothesis, the paper's findings about its 650 M to 34 B models: (1) routing goes by the token's id, hardly by context,
position or domain; (2) it is fixed early in training; (3) under a capacity limit the tokens towards the end of a
sequence are dropped, more so on text unlike the training data.

Recipe as in the paper and its code at our size: every second layer a mixture with a dense feed-forward beside it (the
text's residual form), top-2 with raw softmax probabilities, capacity 1.25 in training and without the factor k (as the
code has it: of perfectly balanced routing it keeps every first and a quarter of all second choices), groups of one
sequence, load-balance loss 0.02 (the code's 0.01 in the scale where balanced is 2), router z-loss 1e-4, logit z-loss
1e-4, untied head. What differs: causal language modelling throughout (theirs begins with the UL2 mixture), AdamW
instead of Adafactor, byte-pair vocabulary of 1,024 trained here instead of umT5's 256k, SwiGLU instead of the code's
cubic gate.

`dense_active` has the width a token passes through, `dense_total` all of it. The reading arms share the mixture's
parameters, which `moe` reads without a limit: `capacity` has the trained one (1.25), `capacity_k` room for
both choices. Expected: the mixture between the two dense twins; a token's id tells its expert more than 50 % of the
time and more than anything else does; 60 % of the final choices made after a fifth of the steps; drops rising along the
sequence. Cost on 2 CPU cores: ``:smoke`` half a minute, ``:laptop`` (about 1.5 M parameters, 500 steps, 3 seeds) about
20 minutes. ``:gpu`` (16 experts, 124 M active) and ``:paper`` (OpenMoE-8B's sizes) have not been run.

Measured at ``:laptop``: bits per byte 1.770 (mixture), 1.781 (equal active), 1.790 (equal total, so width alone does
not help a model this small). The id foretells the expert in 65 % of cases (the position in 18 %, as much as nothing
does), the token before in 38 %. Early learning is not seen: after a fifth of the 500 steps 30 % of the final choices
are made, chance being 25 %; the router moves as long as the learning rate is high. Under the trained capacity 21 % of
the choices of a sequence's first quarter are dropped and 62 % of the last's, with room for both choices 2 and 15 %;
4 % of Genesis (same book as the training text) and 10 % of the Python manual.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke", "laptop", "gpu", "paper")

# What has certificates at `:paper` (`python -m experiments.compile --all`).
CERTIFIED = (
    {"step": "train", "arm": "moe", "topology": "v5p:4x4x4"},
    {"step": "decode", "arm": "moe", "topology": "v5p:2x2x1", "length": 2048, "batch": 4},
)


def _moe(experts: int, width: int, every: int) -> dict[str, Any]:
    return {
        "name": "moe",
        "experts": experts,
        "router": {"name": "topk", "k": 2, "softmax": "before"},
        "d_expert": width,
        "shared": width,
        "every": every,
        "capacity": 1.25,
        "capacity_counts_k": False,
        "min_capacity": 4,
        "group": "sequence",
        "load_balance_loss": 0.02,
        "router_z_loss": 1e-4,
    }


def _arms(experts: int, width: int, every: int) -> dict[str, dict[str, Any]]:
    """Dense twins: in a mixture layer a token passes the shared width and two experts."""

    def dense(d: int) -> dict[str, Any]:
        return {
            "model.ffn": {"name": "swiglu"},
            "model.layer_overrides": ({"layers": f"{every - 1}::{every}", "d_ff": d},),
            "only": ("training",),
        }

    limit = {"model.ffn.eval_capacity": 1.25, "only": ("routing",)}
    return {
        "moe": {},
        "dense_active": dense(3 * width),
        "dense_total": dense((experts + 1) * width),
        "capacity": limit,
        "capacity_k": {**limit, "model.ffn.capacity_counts_k": True},
    }


def get_config(scale: str = "laptop") -> ConfigDict:
    c = ConfigDict()
    c.name = "openmoe"
    c.scale = scale
    c.paper = {
        "title": "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
        "arxiv": "2402.01739",
        "claim": "routing is by token id, learned early, and drops tokens towards the end of a sequence",
        "numbers": {
            "drops late in a sequence, MT-Bench and multilingual text": "up to 35-50 %",
            "TriviaQA exact match, OpenMoE-8B / OpenLLaMA-3B / TinyLLaMA": "32.7 / 29.7 / 11.2",
        },
    }
    c.checkpoint = "random"
    c.baseline = "moe"
    c.seeds = (0, 1, 2)
    size = {"smoke": "smoke", "laptop": "study", "gpu": "gpu", "paper": "gpu"}[scale]
    c.model, c.train = small.model(size), small.train(size)
    experts, every = 8, 2
    routing: dict[str, Any] = {"name": "routing", "texts": ("kjv:Genesis", "python-docs"), "length": 128, "rows": 128}
    history: dict[str, Any] = {"name": "routing_history", "texts": ("kjv:Genesis",), "length": 128, "rows": 32}
    if scale == "smoke":
        c.seeds = (0,)
        c.train.update({"keep_every": 2, "save_every": 2})
        experts = 4
        routing.update(length=32, rows=8, bin=4)
        history.update(length=32, rows=4)
    elif scale == "laptop":
        c.train.update({"steps": 500, "eval_every": 125, "save_every": 25, "keep_every": 25})
        c.train["optimizer"] = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}
    elif scale == "gpu":
        experts, every = 16, 4
        c.model["n_layers"] = 12
        c.train.update({"save_every": 250, "keep_every": 250})
        routing.update(length=1024, rows=64, bin=32)
        history.update(length=1024)
    elif scale == "paper":
        experts, every = 32, 6
        c.model = {
            "vocab_size": 32768,
            "d_model": 2048,
            "n_layers": 24,
            "n_heads": 24,
            "head_dim": 128,
            "d_ff": 8192,
            "max_positions": 2048,
            "dtype": "bfloat16",
            "remat": True,
        }
        c.train.update({"steps": 500_000, "batch": 2048, "save_every": 10_000, "keep_every": 50_000})
        c.train["data"] = {"texts": ("tfds:c4/en",), "tokenizer": "bpe:32768", "seq_len": 2048}
        c.train["mesh"] = {"data": 1, "fsdp": -1, "expert": 8}
        routing.update(length=2048, rows=64, bin=64)
        history.update(length=2048)
    width = c.model["d_ff"] // (1 if scale == "paper" else 2)
    c.model["ffn"] = _moe(experts, width, every)
    c.model["head"] = {"name": "linear", "tie": False}
    c.train["objective"] = {"name": "causal", "z_loss": 1e-4}
    c.train["schedule"] = {"name": "cosine", "warmup": 0.1, "final": 0.1}
    c.train["clip"] = 1.0
    c.measures = {"training": {"name": "train_log"}, "routing": routing, "history": history}
    c.arms = ConfigDict(_arms(experts, width, every), allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def twins() -> tuple[bool, dict[str, float]]:
        m = {a: r.mean(a, "training/bits_per_byte") for a in ("moe", "dense_active", "dense_total")}
        return m["moe"] < m["dense_active"], {f"{a}, bits per byte": v for a, v in m.items()}

    def by_id() -> tuple[bool, dict[str, float]]:
        about = ("id", "previous", "position", "text")
        m = {f"nats by {c}": r.mean("moe", f"routing/info_{c}") for c in about}
        hits = {f"accuracy by {c}": r.mean("moe", f"routing/accuracy_{c}") for c in ("id", "position", "none")}
        own, others = m["nats by id"], [m[f"nats by {c}"] for c in about[1:]]
        return own > 2 * max(0.0, *others) and hits["accuracy by id"] > 0.5, {**m, **hits}

    def early() -> tuple[bool, dict[str, float]]:
        m = {k: r.mean("moe", f"history/overlap_{k}") for k in ("early", "chance", "first")}
        return m["early"] > 0.6 > m["chance"], {f"overlap, {k}": v for k, v in m.items()}

    def drops(arm: str) -> dict[str, float]:
        return {f"{arm}: {w}": r.mean(arm, f"routing/dropped_{w}") for w in ("early", "late")}

    def late() -> tuple[bool, dict[str, float]]:
        m = {**drops("capacity"), **drops("capacity_k")}
        return m["capacity: late"] > m["capacity: early"] + 0.05, m

    def with_room() -> tuple[bool, dict[str, float]]:
        m = drops("capacity_k")
        return m["capacity_k: late"] > m["capacity_k: early"] + 0.05, m

    def foreign() -> tuple[bool, dict[str, float]]:
        m = {t: r.mean("capacity_k", f"routing/dropped@{t}") for t in ("kjv", "python-docs")}
        return m["python-docs"] > m["kjv"], {f"dropped, {t}": v for t, v in m.items()}

    return [
        claim("(a) the mixture ends below its dense twin of equal active parameters", twins),
        claim(
            "(b) a token's id tells its expert in more than half of all cases, and more than twice as many nats as the "
            "token before, the position or the domain",
            by_id,
        ),
        claim("(c) after 20 % of the steps more than 60 % of the final choices are made, and chance is below", early),
        claim(
            "(d) under the trained capacity the last quarter of a sequence loses 5 points more choices than the first",
            late,
            paper="up to 35-50 % dropped late",
        ),
        claim(
            "(d') so it does with room for both choices (capacity times k), where the rule itself drops nothing",
            with_room,
        ),
        claim("(e) with that room, text unlike the training data loses more", foreign),
    ]
