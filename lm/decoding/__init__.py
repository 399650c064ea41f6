"""SOCKET decoding: how the next tokens are chosen.

`Sampling` says how one token is drawn from logits (`lm.decoding.logits`), `lm.decoding.sampler.Generator` runs the loop
on the device.
"""

from __future__ import annotations

from lm.decoding.logits import Sampling
from lm.decoding.sampler import Generated, Generator

__all__ = ["Generated", "Generator", "Sampling"]
