"""A small model as measures take it."""

from __future__ import annotations

from typing import Any

import jax

from lm.config import build, model_config
from lm.data.tokenizers import ByteTokenizer
from lm.measures import Subject
from lm.model import params as params_lib
from lm.model.language_model import DecoderModel
from lm.plug import table

CFG = model_config(
    {
        "vocab_size": 258,
        "d_model": 16,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 16,
        "max_positions": 64,
        "pattern": {"name": "longheads", "chunk": 8, "attention_length": 40},
    }
)


def subject(cfg: Any = CFG, layers: str = "stacked") -> Subject:
    tree = params_lib.init(cfg, jax.random.key(0))
    return Subject(DecoderModel(cfg), params_lib.unstack(tree) if layers == "apart" else tree, ByteTokenizer())


def measure(name: str, **fields: Any) -> Any:
    return build(table("lm.measures")[name], fields, f"measures.{name}")


def quiet(share: float, what: str) -> None:
    assert 0 < share <= 1
