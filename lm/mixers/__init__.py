"""SOCKET mixer: the token-mixing layer of a block.

A plug is a frozen dataclass of settings with ``module(model_config, name) -> nn.Module`` whose call is
``(x_BTD, tokens, length, cache) -> (y_BTD, cache')``; `cache` is None or the layer's `lm.caches` state.
"""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "softmax": "lm.mixers.softmax:SoftmaxAttention",
    }
)
