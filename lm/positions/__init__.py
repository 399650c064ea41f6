"""SOCKET positions: how a token's position enters the model (`lm.positions.base.Positions`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "rope": "lm.positions.rope:Rope",
        "alibi": "lm.positions.alibi:Alibi",
        "nope": "lm.positions.nope:NoPE",
        "learned": "lm.positions.learned:Learned",
    }
)
