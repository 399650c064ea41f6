"""What the Mosaic GPU kernels share: operands of the matrix unit, layouts in registers, and how all of it is interpreted.

A kernel body takes an `Ops`. Compiled, `Ops` is the operations of `jax.experimental.pallas.mosaic_gpu`. Interpreted on a
CPU, threads, barriers, copies and the indices of everything are simulated by jax's interpreter, which looks for races;
it has no word for transposed operands, accumulators that go on, and layouts: there a product is `jnp.dot` of what the
references hold, and a layout is nothing. So the interpreter checks what is computed from what, and in which order; that
layouts and tilings fit is checked by the lowering, which needs no GPU either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm.compat import compile_interpreted_threads_once, gpu_load

WARPGROUP = 128  # threads of one; the matrix unit multiplies 64 rows for each
SWIZZLE = 128  # bytes of a row of a tile in shared memory


def params(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as ``interpret``."""
    if not interpret:
        return False
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name yet

    compile_interpreted_threads_once()

    return InterpretGPUParams(detect_races=True)


def smem(shape: tuple[int, ...], dtype: Any, swizzle: int = SWIZZLE) -> Any:
    """Shared memory for an operand of the matrix unit: tiles of 8 rows by `swizzle` bytes (128, 64, 32), swizzled."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    tiled = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
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

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        return self.tile(jax.lax.broadcasted_iota(jnp.int32, shape, axis))

    def load(self, ref: Any, index: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
        """``ref[index]`` of shared memory, or (not `optimized`) of global memory, in a layout."""
        return ref[index] if self.interpret else gpu_load(ref, index, layout=layout, optimized=optimized)

    def load_transposed(self, ref: Any) -> jax.Array:
        """``ref[...].T`` of swizzled shared memory; `tile` makes it an operand once it has 16 bits."""
        if self.interpret:
            return ref[...].T
        return self.cast(plgpu.transpose_ref(ref, (1, 0))[...], plgpu.Layout.WGMMA_TRANSPOSED)

    def dot(
        self, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False, acc: Any = None
    ) -> jax.Array:
        """``acc + a @ b``: `a` a reference to shared memory or a tile in registers, `b` a reference to shared memory."""
        if self.interpret:
            x, y = (a if isinstance(a, jax.Array) else a[...]), b[...]
            plgpu.commit_smem()  # the matrix unit reads as copies write; a plain read does not
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

    def dots(self, pairs: Sequence[tuple[Any, Any]], *, transpose_b: bool = False) -> jax.Array:
        """The sum of ``a @ b`` over `pairs`, in one accumulator; operands as of `dot`."""
        if self.interpret:
            return sum(self.dot(a, b, transpose_b=transpose_b) for a, b in pairs)  # type: ignore[return-value]
        pairs = [(a, plgpu.transpose_ref(b, (1, 0)) if transpose_b else b) for a, b in pairs]

        def together(ref: Any) -> jax.Array:
            for a, b in pairs:
                plgpu.wgmma(ref, a, b)
            return ref[...]

        return pl.run_scoped(together, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))
