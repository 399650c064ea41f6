"""SOCKET mixer: the token-mixing layer of a block (`lm.mixers.base.Mixer`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table({"softmax": "lm.mixers.softmax:SoftmaxAttention", "mla": "lm.mixers.mla:MLA"})
