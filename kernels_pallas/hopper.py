"""What the Mosaic GPU kernels share: operands of the matrix unit, layouts in registers, and how they are interpreted.

A kernel body takes an `Ops`: compiled, the operations of `jax.experimental.pallas.mosaic_gpu`. Interpreted on a
CPU, threads, barriers, copies and the indices of everything are simulated by jax's interpreter, which looks for races;
it has no word for transposed operands, accumulators that go on, and layouts: there a product is `jnp.dot` of what the
references hold, and a layout is nothing. So the interpreter checks what is computed from what, and in which order; that
layouts and tilings fit is checked by the lowering, which needs no GPU either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128  # threads of one; the matrix unit multiplies 64 rows for each
SWIZZLE = 128  # bytes of a row of a tile in shared memory


def params(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as ``interpret``."""
    if not interpret:
        return False
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name yet

    return InterpretGPUParams(detect_races=True)


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for an operand of the matrix unit: tiles of 8 rows by 128 bytes, swizzled."""
    columns = SWIZZLE // jnp.dtype(dtype).itemsize
    tiled = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=tiled)


@dataclass(frozen=True)
class Ops:
    """Operations of a kernel body, compiled or interpreted. Products are float32, ``[64 n, ...]`` in layout WGMMA."""

    interpret: bool = False

    def cast(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def tile(self, x: jax.Array) -> jax.Array:
        """A tile in the layout of products."""
        return self.cast(x, plgpu.Layout.WGMMA)

    def per_row(self, x: jax.Array) -> jax.Array:
        """A number per row of a tile."""
        return self.cast(x, plgpu.Layout.WGMMA.reduce(1))

    def per_column(self, x: jax.Array) -> jax.Array:
        """A number per column of a tile."""
        return self.cast(x, plgpu.Layout.WGMMA.reduce(0))

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        return self.tile(jax.lax.broadcasted_iota(jnp.int32, shape, axis))

    def load(self, ref: Any, index: Any, layout: Any) -> jax.Array:
        """``ref[index]`` of shared or global memory, in a layout."""
        return ref[index] if self.interpret else plgpu.load(ref, index, layout=layout)

    def dot(
        self, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False, acc: Any = None
    ) -> jax.Array:
        """``acc + a @ b``: `a` in shared memory (a reference) or a tile in registers, `b` in shared memory."""
        if self.interpret:
            x, y = (a if isinstance(a, jax.Array) else a[...]), b[...]
            x, y = (x.T if transpose_a else x), (y.T if transpose_b else y)
            product = jnp.dot(x, y, preferred_element_type=jnp.float32)
            return product if acc is None else acc + product
        if transpose_a:
            a = plgpu.transpose_ref(a, (1, 0))
        if transpose_b:
            b = plgpu.transpose_ref(b, (1, 0))
        if acc is not None:
            return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))

        def alone(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, a, b)
            return ref[...]

        return pl.run_scoped(alone, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
