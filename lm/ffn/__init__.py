"""SOCKET ffn: the channel-mixing layer of a block.

A plug is a frozen dataclass with ``module(model_config, name) -> nn.Module`` whose call maps ``x[B, T, D]`` to the
same shape. Optional: ``reports = True``: the module is called with ``(x, lm.ffn.context.Call)`` and gives the output
and a report (`lm.model.reports`, also for ``update`` and ``report``); ``for_layer(i)``: the plug of layer i;
``uncached``: why a text cannot be continued token by token, empty when it can; ``active``: the share of stacked
experts a token uses.
"""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "swiglu": "lm.ffn.glu:SwiGLU",
        "geglu": "lm.ffn.glu:GeGLU",
        "geglu_tanh": "lm.ffn.glu:GeGLUTanh",
        "gelu": "lm.ffn.mlp:Gelu",
        "gelu_tanh": "lm.ffn.mlp:GeluTanh",
        "relu": "lm.ffn.mlp:Relu",
        "relu2": "lm.ffn.mlp:Relu2",
        "moe": "lm.ffn.moe.plug:MoE",
    }
)
