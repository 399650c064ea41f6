"""SOCKET head: hidden state to a distribution (`lm.heads.base.Head`).

Heads over ordered bins (`lm.heads.bins`) take every id of the vocabulary for a bin of a bounded quantity.
"""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "linear": "lm.heads.linear:Linear",
        "fourier": "lm.heads.fourier:Fourier",
        "mixture": "lm.heads.mixture:Mixture",
    }
)
