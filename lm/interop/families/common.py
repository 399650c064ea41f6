"""What a family is, and what several families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

import lm.interop.families.keys as keys
from lm.config import ModelConfig, to_dict
from lm.errors import UserError, unknown
from lm.ffn.glu import SwiGLU
from lm.ffn.mlp import Gelu
from lm.ffn.moe.plug import MoE
from lm.heads.linear import Linear
from lm.interop.families.table import Table
from lm.mixers.softmax import SoftmaxAttention
from lm.plug import table

Hf = Mapping[str, Any]  # a config.json
Fuse = Callable[[ModelConfig, list[np.ndarray]], np.ndarray]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Fused:
    """Layers, by our names within a layer, that a file keeps as one. `join` makes one tensor of theirs: of matrices
    ``[..., in, out]``, or of biases ``[..., out]``."""

    parts: tuple[str, ...]
    join: Fuse


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of `transformers`.

    * `name`: that ``model_type``.
    * `fields`: a config.json, in which no key of `defaults` is absent, to fields of ``ModelConfig``.
    * `write`: a ``ModelConfig`` to a config.json. It may lose settings: whoever writes reads back and compares.
    * `table`: the tensors. Files may leave `prefix` out of their names. `head` is the tensor of an untied head.
    * `defaults`: every key of a config.json that the family knows, and what it stands for where it is absent.
    * `fused`: what the file keeps in one tensor.
    * `inputs_first`: linear layers are stored as ``[in, out]``.
    """

    name: str
    fields: Callable[[Hf], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Table
    defaults: Hf
    prefix: str = "model."
    head: str = "lm_head.weight"
    fused: tuple[Fused, ...] = ()
    inputs_first: bool = False

    def read(self, hf: Hf) -> dict[str, Any]:
        """A config.json to fields of ``ModelConfig``. Raises `UserError` for a key that the family does not know, and
        for a value that it cannot have."""
        keys.refuse_unknown(hf, self.defaults, self.name)
        return self.fields({**self.defaults, **hf})

    def fuses(self, ours: str) -> Fused | None:
        """What the parameter `ours` is kept together with; None = it has a tensor of its own."""
        layer = ours.rpartition("/")[0]
        return next((fused for fused in self.fused if layer in fused.parts), None)


QKV = ("attn/q", "attn/k", "attn/v")
# Where rotary settings may stand; null says nothing, as an absent key does.
ROTARY: Hf = dict.fromkeys(
    ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
)


# Activations over there -> feed-forward plugs.
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def pick(options: Mapping[str, Value], value: object, key: str) -> Value:
    """``options[value]``; `UserError` naming the `key` of config.json for a value that is no option."""
    if not isinstance(value, str) or value not in options:
        raise unknown(f"config.json {key}", value, options)
    return options[value]


def need(hf: Hf, key: str) -> Any:
    """``hf[key]``; `UserError` when it is absent or null."""
    if hf.get(key) is None:
        raise UserError(f"config.json: key {key!r} is missing")
    return hf[key]


def count(hf: Hf, key: str) -> int:
    """``hf[key]``, 1 or more; `UserError` otherwise."""
    found = int(need(hf, key))
    if found < 1:
        raise UserError(f"config.json {key}: found {found}; valid: 1 or more")
    return found


def without(hf: Hf, *keys: str) -> dict[str, Any]:
    return {k: v for k, v in hf.items() if k not in keys}


def sliding_window(width: int) -> dict[str, Any]:
    return {"name": "sliding_window", "window": width}


# What a model's plugs say in a config.json. For a plug that no family knows these give some value: it reads back as
# another plug, and the writer names the difference.


def window_of(cfg: ModelConfig) -> int | None:
    """The width of a sliding window, None for other patterns."""
    pattern = to_dict(cfg.pattern, table("lm.patterns"))
    return int(pattern["window"]) if pattern["name"] == "sliding_window" else None


def attention_of(cfg: ModelConfig) -> SoftmaxAttention:
    return cfg.mixer if isinstance(cfg.mixer, SoftmaxAttention) else SoftmaxAttention()


def ties(cfg: ModelConfig) -> bool:
    """Whether the head reads the embedding table."""
    return isinstance(cfg.head, Linear) and cfg.head.tie


def ffn_bias(cfg: ModelConfig) -> bool:
    return isinstance(cfg.ffn, (SwiGLU, Gelu)) and cfg.ffn.bias


def activation(options: Mapping[str, str], cfg: ModelConfig) -> str:
    """The name in `options` of the feed-forward plug, or of a mixture's experts; the first for one that has none."""
    ours = cfg.ffn.expert if isinstance(cfg.ffn, MoE) else table("lm.ffn").name_of(type(cfg.ffn))
    return next((theirs for theirs, name in options.items() if name == ours), next(iter(options)))
