"""On a GPU: XLA operations. No Mosaic GPU kernel exists yet.

XLA fuses the unpacking into an elementwise kernel, but writes the dequantised matrix to memory before the product, so
nothing is gained over bfloat16 weights but their storage.
"""

from __future__ import annotations

from kernels_pallas.int4_matmul.reference import xla as int4_matmul

__all__ = ["int4_matmul"]
