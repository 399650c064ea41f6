"""What measures share."""

from __future__ import annotations

import pytest

from lm.measures.base import exponent


def test_an_exponent_is_the_slope_over_logarithms() -> None:
    lengths = [100, 300, 1000]
    for p in (0.0, 1.0, 1.7):
        assert exponent(lengths, [3.0 * n**p for n in lengths]) == pytest.approx(p, abs=1e-9)
