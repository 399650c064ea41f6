"""What the tests of every kernel need: errors as RMS ratios, lowering for a TPU from any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import common

# Nothing may be read before it is written, nothing outside the blocks, nothing while another core writes it. Two cores:
# what a kernel calls parallel runs in parallel, as on a v4 or v5p.
STRICT = common.strict()


def how(
    implementation: str = "auto",
    chip: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    interpret: common.Interpret = True,
    **sizes: int | None,
) -> common.How:
    """How a kernel runs, with block sizes by name. Heads go over the axis ``tensor`` of a mesh."""
    axes: dict[str, Any] = {} if mesh is None else {"mesh": mesh, "head_axis": "tensor"}
    return common.How(implementation, chip, common.sized(**sizes), interpret, **axes)


def without_races(call: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> Any:
    """The result of a call that uses `STRICT`; jax 0.10 prints a race, later versions raise."""
    out = jax.block_until_ready(call())
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed
    return out


def rms_ratio(found: Any, truth: Any) -> float:
    """Root mean square of the difference over that of the truth, both trees; NaN if any is."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    off = sum(float(np.sum((np.float64(a) - np.float64(b)) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(np.float64(b) ** 2)) for _, b in pairs)
    return float(np.sqrt(off / size))


def exact(tree: Any) -> Any:
    """The same values in float32: what the truth is computed from."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def assert_as_good(found: Any, xla: Any, truth: Any, dtype: Any) -> None:
    """At most twice the error of XLA's own form, and small in itself."""
    # The floor: in float32 the truth itself is rounded, and XLA's form may be the same operation.
    floor, limit = (1e-6, 1e-5) if dtype == jnp.float32 else (2e-4, 1e-2)
    error, theirs = rms_ratio(found, truth), rms_ratio(xla, truth)
    assert error <= limit, f"RMS ratio {error:.2e}"
    assert error <= 2 * theirs + floor, f"RMS ratio {error:.2e}, XLA's own {theirs:.2e}"


def lowered_for_tpu(function: Callable[..., Any], *arguments: Any) -> str:
    """The program for a TPU, from a machine without one and without its compiler."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def lowered_for_gpu(function: Callable[..., Any], *arguments: Any) -> str:
    """The program for CUDA; Mosaic GPU checks layouts and shared memory on the way, and needs no GPU for it."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def without_gpu_races(call: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> Any:
    """The result of a call interpreted as `kernels_pallas.hopper.params` says; a race is printed or raised."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter  # no public name yet

    try:
        return without_races(call, capfd)
    finally:
        interpreter.reset_gpu_interpret_mode_state()
