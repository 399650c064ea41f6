"""On a GPU: the gather of listed blocks in XLA operations. No Mosaic GPU kernel exists yet."""

from __future__ import annotations

from kernels_pallas.block_table.reference import xla as attention

__all__ = ["attention"]
