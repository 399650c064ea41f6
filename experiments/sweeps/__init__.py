"""One experiment at many settings. Config files write their sweeps with the combinators that this package offers."""

from __future__ import annotations

from experiments.sweeps.combinators import chain, grid, prefix, product, subsample, zip_

__all__ = ["chain", "grid", "prefix", "product", "subsample", "zip_"]
