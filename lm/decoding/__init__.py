"""SOCKET decoding: how the next tokens are chosen.

`Sampling` says how one token is drawn from logits (`lm.decoding.sampling`), `Generator` runs the loop on the device
(`lm.decoding.generator`), also for rows that are drawn each in its own way (`lm.decoding.rows`); `lm.decoding.scoring`
reads texts that are there already.
"""

from __future__ import annotations

from lm.decoding.generator import Generated, Generator
from lm.decoding.rows import Piece, Row
from lm.decoding.sampling import Sampling

__all__ = ["Generated", "Generator", "Piece", "Row", "Sampling"]
