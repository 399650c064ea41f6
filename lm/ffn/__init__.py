"""SOCKET ffn: the channel-mixing layer of a block.

A plug is a frozen dataclass with ``module(model_config, name) -> nn.Module`` whose call maps ``x[B, T, D]`` to the
same shape. Optional: ``reports = True``: the module is called with ``(x, lm.ffn.context.Call)`` and gives the output
and a report (`lm.auxiliary`, also for ``update`` and ``report``); ``for_layer(i)``: the plug of layer i; ``uncached``:
why a text cannot be continued token by token, empty when it can; ``active``: the share of stacked experts a token uses.
"""

from __future__ import annotations

from lm.ffn.glu import GeGLU, GeGLUTanh, SwiGLU
from lm.ffn.mlp import Gelu, GeluTanh, Relu, Relu2
from lm.ffn.moe import MoE

TABLE = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": GeGLUTanh,
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "relu2": Relu2,
    "moe": MoE,
}
