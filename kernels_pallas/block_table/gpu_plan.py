"""How a call of `block_table` is cut for Hopper: what the kernel serves, and the tiles that fit shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from kernels_pallas.block_table.problem import Filled
from kernels_pallas.common import GPUS, How, Shaped

ROWS = 64  # the matrix unit multiplies for a warpgroup
ID_BITS, TURN_BITS, WHOLE = 17, 12, 1 << 29
COUNT, END, FIRST = 0, 1, 2  # of a list in memory: entries, slots of the row, the first word
WIDEST = 256


@dataclass(frozen=True)
class Plan:
    """How a call is cut: computing warpgroups and queries of a block of threads, keys of a tile, parts of a list."""

    groups: int
    rows: int
    tile: int
    stages: int
    parts: int
    d: int
    m: int  # pairs of channels that turn
    length: int  # int32 words of a list

    @property
    def columns(self) -> int:
        """Of a tile of shared memory: 64, 32 or 16, a divisor of the width and of the pairs."""
        return math.gcd(64, self.d, self.m)

    @property
    def memory(self) -> int:
        """Bytes of shared memory: tiles ahead, queries (plain and turned), partial outputs; 6 KiB for what is small."""
        queries = 2 * self.groups * ROWS * self.d * (2 if self.m else 1)
        partial = 4 * self.groups * ROWS * self.d if self.parts > 1 else 0
        return queries + partial + 4 * self.stages * self.tile * self.d + 4 * self.length + 6 * 1024


@dataclass(frozen=True)
class Lists:
    """Units, queries R of one, entries n of a list, slots w of a block, width d, pairs m that turn."""

    U: int
    R: int
    n: int
    w: int
    d: int
    m: int


def plan(lists: Lists, sizes: dict[str, int], limit: int) -> Plan | None:
    """The largest tiles of at most ``sizes["tile"]`` keys that divide a block and fit `limit` bytes, or None.

    One warpgroup takes half of that where it can, so that two blocks share a multiprocessor.
    """
    R, n, w, d = lists.R, lists.n, lists.w, lists.d
    groups = 2 if R > ROWS and d <= 128 else 1
    rows = groups * ROWS if R > ROWS else R + -R % 8
    parts = max(1, min(n, sizes["fill"] // (lists.U * -(-R // rows))))
    length = -(-(FIRST + n) // 32) * 32
    tiles = [x for x in range(min(sizes["tile"], w) // 16 * 16, 0, -16) if w % x == 0]
    plans = [Plan(groups, rows, tile, sizes["stages"], parts, d, lists.m, length) for tile in tiles]
    half = [x for x in plans if x.memory <= limit // 2 and x.groups == 1 and x.tile >= 64]
    return next((x for x in (*half, *plans) if x.memory <= limit), None)


def choose(q: Shaped, lists: tuple[int, ...], w: int, q_block: int, m: int, how: How) -> Plan | None:
    """The plan of a call. `lists`: the shape of the lists; `w`: slots of a block; `m`: pairs that turn."""
    B, T, H, d = q.shape
    h, n = lists[1], lists[3]
    of_call = Lists(B * h * -(-T // q_block), q_block * (H // h), n, w, d, m)
    return plan(of_call, how.blocks("block_table", how.hopper), GPUS[how.hopper].smem)


def refusal(q: Shaped, k: Shaped, lists: Shaped, problem: Filled, how: How) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    d, w, m = q.shape[-1], problem.block_size, problem.pairs
    N = -(-k.shape[2] // w)
    if q.dtype != jnp.bfloat16:
        return f"{q.dtype}, the matrix unit multiplies bfloat16"
    if d > WIDEST or d % 16:
        return f"head width {d}, the kernel takes multiples of 16 up to {WIDEST}"
    if w % 16:
        return f"blocks of {w} keys, the kernel needs multiples of 16"
    if N > 1 << ID_BITS:
        return f"{N} key blocks, the kernel counts up to {1 << ID_BITS}"
    if problem.turns > 1 << TURN_BITS:
        return f"{problem.turns} turns, the kernel counts up to {1 << TURN_BITS}"
    if m % 16:
        return f"turns of {m} pairs of channels, the kernel needs multiples of 16"
    if choose(q, lists.shape, w, problem.q_block, m, how) is None:
        return f"{problem.q_block} queries of width {d} and their tiles of keys exceed the shared memory of a block"
    return None
