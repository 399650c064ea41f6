"""What the Mosaic GPU kernels share: operands of the matrix unit, layouts in registers, and how they are interpreted.

A kernel body takes an `Ops`. Compiled, its operations are those of `jax.experimental.pallas.mosaic_gpu`. Interpreted on
a CPU, jax's interpreter simulates threads, barriers, copies and the indices of everything, and looks for races. The
interpreter has no transposed operands, no accumulators that go on and no layouts. There a product is `jnp.dot` of what
the references hold, and a layout is nothing. So the interpreter checks what is computed from what, and in which order.
The lowering checks that layouts and tilings fit; it needs no GPU either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas.common import Ref
from lm.compat import compile_interpreted_threads_once, gpu_load, gpu_transposed

SWIZZLE = 128  # bytes of a row of a tile in shared memory
Operand = Ref | jax.Array | Callable[[], jax.Array]  # of the matrix unit; a function makes a tile in registers


def params(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as ``interpret``."""
    if not interpret:
        return False
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name yet

    compile_interpreted_threads_once()

    # Copies that share a simulated thread seem ordered, so that a wait for one hides a missing wait for another.
    return InterpretGPUParams(detect_races=True, num_tma_threads_per_device=16)


def copy_in(source: Ref, target: Ref, barrier: Ref) -> None:
    """Starts a copy of global to shared memory; `barrier` counts its arrival."""
    plgpu.copy_gmem_to_smem(source, target, barrier)  # type: ignore[arg-type]


def copy_out(source: Ref, target: Ref) -> None:
    """Starts a copy of shared to global memory."""
    plgpu.copy_smem_to_gmem(source, target)  # type: ignore[arg-type]


def wait(barrier: Ref) -> None:
    plgpu.barrier_wait(barrier)  # type: ignore[arg-type]


def arrive(barrier: Ref) -> None:
    plgpu.barrier_arrive(barrier)  # type: ignore[arg-type]


def _multiply(acc: Ref, a: Ref | jax.Array, b: Ref) -> None:
    """The matrix unit begins ``acc += a @ b``."""
    plgpu.wgmma(acc, a, b)  # type: ignore[arg-type]


def smem(shape: tuple[int, ...], dtype: DTypeLike, swizzle: int = SWIZZLE) -> Any:
    """Shared memory for an operand of the matrix unit: tiles of 8 rows by `swizzle` bytes (128, 64, 32), swizzled."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    tiled = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=tiled)


@dataclass(frozen=True)
class Ops:
    """Operations of a kernel body, compiled or interpreted. Products are float32, ``[64 n, ...]`` in layout WGMMA."""

    interpret: bool = False

    def cast(self, x: jax.Array, layout: object) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)  # type: ignore[arg-type]

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

    def load(self, ref: Ref, index: object, layout: object, *, optimized: bool = True) -> jax.Array:
        """``ref[index]`` of shared memory, or (not `optimized`) of global memory, in a layout."""
        return ref[index] if self.interpret else gpu_load(ref, index, layout=layout, optimized=optimized)

    def load_transposed(self, ref: Ref) -> jax.Array:
        """``ref[...].T`` of swizzled shared memory; `tile` makes it an operand once it has 16 bits."""
        if self.interpret:
            return ref[...].T
        return self.cast(gpu_transposed(ref)[...], plgpu.Layout.WGMMA_TRANSPOSED)

    def dot(
        self,
        a: Ref | jax.Array,
        b: Ref,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        acc: jax.Array | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> jax.Array:
        """``acc + a @ b``: `a` in shared memory (a reference) or a tile in registers, `b` in shared memory.

        `meanwhile` runs when the product is under way, not yet done.
        """
        if self.interpret:
            x, y = (a if isinstance(a, jax.Array) else a[...]), b[...]
            plgpu.commit_smem()  # the matrix unit reads as copies write; a plain read does not
            x, y = (x.T if transpose_a else x), (y.T if transpose_b else y)
            product = jnp.dot(x, y, preferred_element_type=jnp.float32)
            if meanwhile is not None:
                meanwhile()
            return product if acc is None else acc + product
        if transpose_a:
            a = gpu_transposed(a)
        if transpose_b:
            b = gpu_transposed(b)

        def issue(ref: Ref) -> None:
            _multiply(ref, a, b)
            if meanwhile is not None:
                meanwhile()

        if acc is not None:
            return pl.run_state(issue)(plgpu.ACC.init(acc))

        def alone(ref: Ref) -> jax.Array:
            issue(ref)
            return ref[...]

        return pl.run_scoped(alone, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def pair(self, a: Ref, b: Ref, c: Ref, d: Ref, between: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
        """``between(a @ b.T), c @ d.T``: `between` runs while the second product is under way."""
        if self.interpret:
            return between(self.dot(a, b, transpose_b=True)), self.dot(c, d, transpose_b=True)

        def both(first: Ref, second: Ref) -> tuple[Any, jax.Array]:
            _multiply(first, a, gpu_transposed(b))
            _multiply(second, c, gpu_transposed(d))
            got = between(plgpu.wgmma_accumulator_load(first, wait_n=1))
            return got, second[...]

        shapes = ((a.shape[0], b.shape[0]), (c.shape[0], d.shape[0]))
        return pl.run_scoped(both, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def add(self, *terms: tuple[jax.Array, Operand, Ref]) -> tuple[jax.Array, ...]:
        """``acc + a @ b`` of each term `(acc, a, b)`; an `a` that is a function runs when those before do."""
        if self.interpret:
            return tuple(self.dot(a() if callable(a) else a, b, acc=acc) for acc, a, b in terms)

        def issue(refs: Sequence[Ref]) -> None:
            for ref, (_, a, b) in zip(refs, terms, strict=True):
                _multiply(ref, a() if callable(a) else a, b)

        return tuple(pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc, _, _ in terms)))

    def dots(self, pairs: Sequence[tuple[Ref | jax.Array, Ref]], *, transpose_b: bool = False) -> jax.Array:
        """The sum of ``a @ b`` over `pairs`, in one accumulator; operands as of `dot`."""
        if self.interpret:
            return sum(self.dot(a, b, transpose_b=transpose_b) for a, b in pairs)  # type: ignore[return-value]
        pairs = [(a, gpu_transposed(b) if transpose_b else b) for a, b in pairs]

        def together(ref: Ref) -> jax.Array:
            for a, b in pairs:
                _multiply(ref, a, b)
            return ref[...]

        return pl.run_scoped(together, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))
