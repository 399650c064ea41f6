"""SOCKET ffn: the channel-mixing layer of a block (`lm.ffn.base.FFN`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "swiglu": "lm.ffn.glu:SwiGLU",
        "geglu": "lm.ffn.glu:GeGLU",
        "geglu_tanh": "lm.ffn.glu:GeGLUTanh",
        "clamped_swiglu": "lm.ffn.glu:ClampedSwiGLU",
        "gelu": "lm.ffn.mlp:Gelu",
        "gelu_tanh": "lm.ffn.mlp:GeluTanh",
        "relu": "lm.ffn.mlp:Relu",
        "relu2": "lm.ffn.mlp:Relu2",
        "moe": "lm.ffn.moe.plug:MoE",
    }
)
