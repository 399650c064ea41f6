"""How far the estimate of memory is from the compiler, on small models in layouts that no certificate has.

``python -m benchmarks.memory [--out=benchmarks/results/memory-aot.json] [--only=NAME …]``

Every case is a model of 0.1 to 2 B parameters on 8 or 16 chips: fsdp, tensor, sequence, expert and stage axes, parts of
a step, with and without remat, layers stacked or not, both attention backends. Cases that the file has are not made
again. Prints estimate over compiler for each. Needs the extra ``aot`` for what is not there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from lm.aot import certificate
from lm.aot.estimate import estimate
from lm.config import ModelConfig, build, model_config
from lm.errors import unknown
from lm.files import write_json
from lm.train.config import TrainConfig

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "memory-aot.json"
SCHEMA = 1

LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "d_model": 2048,
    "n_layers": 8,
    "n_heads": 16,
    "n_kv_heads": 8,
    "d_ff": 5632,
    "max_positions": 2048,
    "head": {"name": "linear", "tie": False},
    "dtype": "bfloat16",
    "remat": True,
}
GPT: dict[str, Any] = {
    "vocab_size": 51200,
    "d_model": 4096,
    "n_layers": 8,
    "n_heads": 32,
    "d_ff": 16384,
    "max_positions": 2048,
    "norm": {"name": "layernorm", "eps": 1e-5},
    "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
    "positions": {"name": "learned", "size": 2048},
    "ffn": {"name": "gelu_tanh", "bias": True},
    "head": {"name": "linear", "tie": True},
    "dtype": "bfloat16",
    "remat": True,
}
ROUTED: dict[str, Any] = {**LLAMA, "d_model": 1024, "d_ff": 4096, "n_heads": 8}
MOE: dict[str, Any] = {
    **ROUTED,
    "ffn": {"name": "moe", "experts": 8, "router": {"name": "topk", "k": 2}, "d_expert": 2048},
}
EVERY_FOURTH: dict[str, Any] = {
    **ROUTED,
    "vocab_size": 64000,
    "ffn": {
        "name": "moe",
        "experts": 8,
        "router": {"name": "topk", "k": 2, "softmax": "before"},
        "d_expert": 4096,
        "shared": 4096,
        "every": 4,
        "capacity": 1.25,
        "capacity_counts_k": False,
        "min_capacity": 4,
        "group": "sequence",
        "load_balance_loss": 0.02,
        "router_z_loss": 1e-3,
    },
}
PALLAS: dict[str, Any] = {"mixer": {"name": "softmax", "backend": "pallas"}}
SPLIT: dict[str, Any] = {"rules": {"stream": ("sequence", "tensor")}}


def rows(batch: int, seq_len: int = 2048, accumulate: int = 1, **mesh: Any) -> dict[str, Any]:
    return {"batch": batch, "accumulate": accumulate, "data": {"seq_len": seq_len}, "mesh": {"data": 1, **mesh}}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fsdp": (LLAMA, rows(32, fsdp=8), "v5e:2x4"),
    "fsdp_pallas": ({**LLAMA, **PALLAS}, rows(32, fsdp=8), "v5e:2x4"),
    "fsdp_no_remat": ({**LLAMA, "remat": False}, rows(16, fsdp=8), "v5e:2x4"),
    "fsdp_tensor": (GPT, rows(16, fsdp=4, tensor=2), "v5p:2x2x2"),
    "sequence": (LLAMA, rows(8, 8192, fsdp=2, sequence=4), "v5e:2x4"),
    "data": (LLAMA, rows(32, data=8), "v6e:2x4"),
    "data_fsdp": ({**LLAMA, "n_layers": 4, "vocab_size": 128000}, rows(32, data=2, fsdp=4), "v6e:2x4"),
    "parts": (LLAMA, rows(64, accumulate=4, fsdp=8), "v5e:2x4"),
    "expert": (MOE, rows(32, fsdp=2, expert=4), "v5e:2x4"),
    "expert_every_fourth": (EVERY_FOURTH, rows(32, fsdp=2, expert=4), "v5e:2x4"),
    "stage": (GPT, rows(32, data=2, stage=4, tensor=2, microbatches=16), "v5p:2x2x4"),
    "stage_split": (GPT, rows(32, data=2, stage=4, tensor=2, microbatches=16, **SPLIT), "v5p:2x2x4"),
}


def settings(name: str) -> tuple[ModelConfig, TrainConfig, str]:
    """Model, training and slice of a case."""
    model, train, topology = CASES[name]
    return model_config(model), build(TrainConfig, train, "train"), topology


def measure(name: str) -> dict[str, Any]:
    """What the compiler makes of a case: bytes of a chip."""
    one = certificate.certify(*settings(name))
    return {key: one[key] for key in ("topology", "mesh", "memory", "jax")}


def run(argv: Sequence[str]) -> int:
    """Raises `UserError` for any mistake in the input."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", help="cases to make where they are missing (default: all)")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in CASES:
            raise unknown("--only", name, CASES)
    for name in CASES if args.only is None else args.only:
        if name not in cases(args.out):
            found = cases(args.out) | {name: measure(name)}
            content = {"schema": SCHEMA, "cases": {key: found[key] for key in CASES if key in found}}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, content)
    for name, one in cases(args.out).items():
        found, peak = estimate(*settings(name))["memory"]["peak"], one["memory"]["peak"]
        print(f"{name}: compiled {peak / 2**30:.2f} GiB, estimate over it {found / peak:.3f}")
    return 0


def cases(path: Path = OUT) -> dict[str, Any]:
    """The cases of a file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["cases"]) if path.exists() else {}


if __name__ == "__main__":
    cli.enter(lambda: cli.main(run))
