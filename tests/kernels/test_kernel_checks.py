"""The race detector detects: two cores add into one block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_checks import STRICT, without_races


def _sum(semantics: str) -> Any:
    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] + 1.0

    return pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        interpret=STRICT,
    )


def test_a_race_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    x = jnp.ones((32, 128))
    with pytest.raises(Exception, match="RACE DETECTED"):
        without_races(lambda: _sum("parallel")(x), capfd)
    pltpu.reset_tpu_interpret_mode_state()
    capfd.readouterr()
    assert float(without_races(lambda: _sum("arbitrary")(x), capfd)[0, 0]) == 2.0
