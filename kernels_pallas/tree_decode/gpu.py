"""On a GPU: the running softmax over chunks of the cache in XLA operations. No Mosaic GPU kernel exists yet."""

from __future__ import annotations

from kernels_pallas.tree_decode.reference import xla as tree_decode

__all__ = ["tree_decode"]
