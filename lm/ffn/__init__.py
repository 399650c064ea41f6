"""SOCKET ffn: the channel-mixing layer of a block.

A plug is a frozen dataclass with ``module(model_config, name) -> nn.Module`` whose call maps ``x[B, T, D]`` to the
same shape.
"""

from __future__ import annotations

from lm.ffn.glu import GeGLU, GeGLUTanh, SwiGLU
from lm.ffn.mlp import Gelu, GeluTanh, Relu, Relu2

TABLE = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": GeGLUTanh,
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "relu2": Relu2,
}
