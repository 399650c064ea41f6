"""Older name of what is in `cases`; for tests of kernels."""

from __future__ import annotations

from cases.model import BASE, TOKENS, T, forward, gradient, logits, parameters, rms_ratio

__all__ = ["BASE", "TOKENS", "T", "forward", "gradient", "logits", "parameters", "rms_ratio"]
