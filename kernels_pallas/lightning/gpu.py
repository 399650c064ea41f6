"""On a GPU: the chunked form in XLA operations. No Mosaic GPU kernel exists yet."""

from __future__ import annotations

from kernels_pallas.lightning.reference import chunked

__all__ = ["chunked"]
