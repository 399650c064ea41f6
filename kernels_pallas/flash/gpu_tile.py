"""What the GPU kernels of `flash` share: their shape, the walk over listed tiles, and the logits of a tile.

A block of threads holds `rows` of one side (queries, or keys in the kernel of dK and dV), 64 per compute warpgroup, and
walks the tiles of the other side that its list names. One more warpgroup fetches them by TMA into `stages` slots of
shared memory; "full" and "empty" barriers hand a slot over and back. Numbers per token (index, segment, position,
log-sum-exp) are read from global memory into registers when a tile begins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas import hopper
from kernels_pallas.common import GPUS, NEG, Index, Ref
from kernels_pallas.flash import table
from kernels_pallas.flash.problem import Mask

LOG2E = math.log2(math.e)
Carry = TypeVar("Carry")  # sums of a walk
ROWS = 64  # of a warpgroup: what one instruction of the matrix unit multiplies
L2 = 32 * 2**20  # bytes of keys and values that blocks running at one time should share; an H100 has 50 MB
Table = dict[str, jax.Array]  # `table.runs` by name
Place = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # of a block of threads, see `call`
MEMORY, COMPUTE = 40, 232  # registers of a thread beside two computing warpgroups; at most 168 on average


@dataclass(frozen=True)
class Shape:
    """Tile sizes of one kernel: compute warpgroups, rows of a streamed tile, slots for them."""

    warpgroups: int
    stream: int
    stages: int

    @property
    def rows(self) -> int:
        return ROWS * self.warpgroups


@dataclass(frozen=True)
class Spec:
    """What is static. `n_keys`: before padding; `kinds`: whether the list has whole, and partial, tiles."""

    mask: Mask
    shape: Shape
    kinds: tuple[bool, bool]
    n_keys: int
    offset: int
    scale: float
    softcap: float | None
    sloped: bool
    interpret: bool

    @property
    def late(self) -> bool:
        """The scale waits for the exponent, where it joins a subtraction for free."""
        return self.softcap is None and not self.sloped and self.scale > 1e-6

    @property
    def unit(self) -> float:
        """What `logits` returns, times this, are exponents of 2."""
        return LOG2E * (self.scale if self.late else 1.0)


def smem_bytes(d: int, shape: Shape, held: int) -> int:
    """Shared memory of a block of threads: `held` operands of `rows`, two streamed ones in `stages` slots; bfloat16."""
    return 2 * d * (held * shape.rows + 2 * shape.stages * shape.stream)


def fit(d: int, rows: int, stream: int, held: int) -> Shape:
    """Two slots, or up to four where shared memory has room; half the rows where it has not even that for two."""
    limit = GPUS["h100"].smem - 2048  # barriers, and what the compiler keeps
    for warpgroups in (rows // ROWS, 1):
        for stages in (4, 3, 2):
            shape = Shape(warpgroups, stream, stages)
            if smem_bytes(d, shape, held) <= limit:
                return shape
    raise ValueError(f"no tile of width {d}, {rows} rows and {stream} streamed rows fits")


def operand(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory for an operand with the widest swizzle that divides its rows (multiples of 32 numbers)."""
    return hopper.smem(shape, dtype, 128 if shape[-1] % 64 == 0 else 64)


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def load(o: hopper.Ops, ref: Ref, row: tuple[Index, ...], first: Index, n: int, axis: int) -> jax.Array:
    """Numbers of `n` tokens from ``ref [*row, tokens]`` in global memory, to be laid along `axis` of a tile."""
    return o.load(ref, (*row, pl.ds(first, n)), plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def walk(
    x: dict[str, Ref], spec: Spec, groups: int, step: Callable[..., Carry], carry: Carry
) -> tuple[jax.Array, Carry]:
    """``carry = step(n, tile, group, whole, carry)`` over the tiles of this block, `groups` times; returns `n` too."""
    row = lax.axis_index("block")
    edges = [x["starts"][row, i] for i in (1, 2, 3)]
    n = jnp.int32(0)
    for whole, kind, begin, end in zip((True, False), spec.kinds, edges[:2], edges[1:], strict=True):
        if not kind:
            continue
        count = end - begin

        def run(
            i: jax.Array,
            state: tuple[jax.Array, Carry],
            whole: bool = whole,
            begin: jax.Array = begin,
            count: jax.Array = count,
        ) -> tuple[jax.Array, Carry]:
            n, carry = state
            group, at = (lax.div(i, count), begin + lax.rem(i, count)) if groups > 1 else (jnp.int32(0), begin + i)
            first, stop = x["runs"][at, 0], x["runs"][at, 1]
            carry = lax.fori_loop(first, stop, lambda j, c: step(n + (j - first), j, group, whole, c), carry)
            return n + (stop - first), carry

        n, carry = lax.fori_loop(0, groups * count, run, (n, carry))
    return n, carry


def slot(n: Index, stages: int) -> jax.Array:
    return lax.rem(n, jnp.int32(stages))


def _wait(barriers: Ref, at: Index) -> None:
    hopper.wait(barriers.at[at])


def produce(x: dict[str, Ref], spec: Spec, groups: int, empties: tuple[Ref, ...], fetch: Callable[..., None]) -> None:
    """The memory warpgroup: ``fetch(i, slot, tile, group)`` for operand `i` when its slot is empty, to the last one."""
    stages = spec.shape.stages

    def step(n: jax.Array, tile: jax.Array, group: jax.Array, whole: bool, carry: tuple[()]) -> tuple[()]:
        at = slot(n, stages)
        for i, empty in enumerate(empties):
            pl.when(n >= stages)(functools.partial(_wait, empty, at))
            fetch(i, at, tile, group)
        return carry

    n, _ = walk(x, spec, groups, step, ())
    for at in range(stages):
        for empty in empties:
            pl.when(at < n)(functools.partial(_wait, empty, at))


def logits(
    o: hopper.Ops,
    spec: Spec,
    s: jax.Array,
    numbers: dict[str, jax.Array],
    first: tuple[Index, Index],
    slope: jax.Array | None,
    whole: bool,
    q_axis: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Logits over `Spec.unit` from products `s`, invisible pairs at `NEG`; d logit / d score; distances.

    `numbers`: per token of the tile, ``q_*`` along `q_axis`, ``k_*`` along the other; `first`: its first query and key.
    """

    def tile(name: str) -> jax.Array:
        return along(numbers[name], s.shape, q_axis if name[0] == "q" else 1 - q_axis)

    distance, bend, shape = None, None, (s.shape[0], s.shape[1])
    if not spec.late:
        s = s * spec.scale
    if slope is not None:
        distance = tile("q_positions") - tile("k_positions")
        s = s - slope * distance
    if spec.softcap is not None:
        t = 1.0 - 2.0 / (jnp.exp2(s * (2 * LOG2E / spec.softcap)) + 1.0)  # tanh; the hardware's own has 11 bits
        s, bend = spec.softcap * t, 1.0 - t * t
    seen = None
    if not whole:
        if "q_index" in numbers:
            qi, ki = tile("q_index"), tile("k_index")
            seen = spec.mask(qi, ki) & (qi >= 0) & (ki >= 0)
        else:
            qi = o.iota(shape, q_axis) + (spec.offset + first[0])
            ki = o.iota(shape, 1 - q_axis) + first[1]
            seen = spec.mask(qi, ki) & (ki < spec.n_keys)
    if "q_segments" in numbers:
        same = tile("q_segments") == tile("k_segments")
        seen = same if seen is None else seen & same
    if seen is not None:
        s = jnp.where(seen, s, NEG / spec.unit)
    return s, bend, distance


def call(
    spec: Spec,
    body: Callable[..., None],
    x: dict[str, jax.Array],
    outs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    held: str,
) -> dict[str, jax.Array]:
    """`plgpu.kernel` of ``body(o, spec, place, x, outs, scratch)``; `held`: "q" or "k", the side whose blocks lead.

    `place`: batch row, head of the held side, block, warpgroup.
    Blocks that run at one time are those of heads whose keys and values (or queries) fit the L2 cache together, the
    longest lists first.
    """
    (B, T, H, d), (S, K) = x["q"].shape, x["k"].shape[1:3]
    heads = H if held == "q" else K
    streamed = 4 * d * (S if held == "q" else T * (H // K))  # bytes of both streamed operands, per key head
    section = next(n for n in range(K, 0, -1) if K % n == 0 and (n == 1 or n * streamed <= L2)) * (heads // K)
    names = list(x)

    def entry(*refs: Any) -> None:
        ins = dict(zip(names, refs, strict=False))
        to = dict(zip(outs, refs[len(names) :], strict=False))
        batch, within, part, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "section", "warpgroup"))
        place = (batch, part * section + within, ins["starts"][lax.axis_index("block"), 0], warpgroup)
        body(hopper.Ops(spec.interpret), spec, place, ins, to, refs[-1])

    kernel = plgpu.kernel(
        entry,
        out_type=list(outs.values()),
        grid=(section, len(x["starts"]), heads // section, B),
        grid_names=("head", "block", "section", "batch"),
        num_threads=spec.shape.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[scratch],
        # Said, for later versions have another default, in which a mask's ~ is not lowered.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=hopper.params(spec.interpret),
        kernel_name="flash" + body.__name__,
    )
    return dict(zip(outs, kernel(*(x[name] for name in names)), strict=True))


def registers(spec: Spec, computes: bool) -> None:
    """Registers move from the memory warpgroup to those that compute; two warpgroups alone have enough."""
    if spec.shape.warpgroups > 1:
        plgpu.set_max_registers(COMPUTE if computes else MEMORY, action="increase" if computes else "decrease")


def tables(tiles: np.ndarray, n_major: int, major: int) -> tuple[Table, tuple[bool, bool]]:
    """`table.runs` as arrays, and the kinds of run in it."""
    starts, found, kinds = table.runs(tiles, n_major, major)
    return {"starts": jnp.asarray(starts), "runs": jnp.asarray(found)}, kinds
