"""What `kernels_pallas.check` compiles and runs of `branches`; as a program, times.

``python -m kernels_pallas.branches.bench``: all logits at once in XLA operations against the kernel, forward and
backward, of LM-Infinite and of Self-Extend's two ranges; on a GPU also cuDNN's plain causal attention, which computes
something else, as the measure of what leaving keys out saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas import common, timing
from kernels_pallas.branches.api import branches
from kernels_pallas.branches.part import Part
from kernels_pallas.common import Case, How, sized
from kernels_pallas.flash import table
from kernels_pallas.flash.api import flash
from kernels_pallas.flash.bench import gradient
from kernels_pallas.flash.problem import Problem

H, K, D = 32, 8, 128  # query heads, key heads, head width of the real sizes


@dataclass(frozen=True)
class Between:
    """Keys `least` to `most` (not included; None = any) tokens back, those before `first` left out, or nothing else."""

    least: int = 0
    most: int | None = None
    first: int = 0
    only_first: bool = False

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        seen = q - k >= self.least
        if self.most is not None:
            seen &= q - k < self.most
        if self.first:
            seen &= (k < self.first) if self.only_first else (k >= self.first)
        return seen

    def tiles(self, n_queries: int, n_keys: int, block_q: int, block_k: int) -> np.ndarray:
        """The non-empty tiles ``[n, 3]``; queries are the last `n_queries` keys."""
        q0 = np.arange(0, n_queries, block_q)[:, None] + n_keys - n_queries
        k0 = np.arange(0, n_keys, block_k)[None]
        q1, k1 = np.minimum(q0 + block_q, n_keys) - 1, np.minimum(k0 + block_k, n_keys) - 1
        low, high = (0, self.first) if self.only_first else (self.first, n_keys)
        most = n_keys + 1 if self.most is None else self.most
        some = (q1 - k0 >= self.least) & (q0 - k1 < most) & (k0 < high) & (k1 >= low)
        whole = (q0 - k1 >= self.least) & (q1 - k0 < most) & (k0 >= low) & (k1 < high) & (k0 + block_k <= n_keys)
        i, j = np.nonzero(some)
        return np.stack([i, j, (whole & some)[some]], 1).astype(np.int32)


@dataclass(frozen=True)
class Shape:
    """A pattern of two branches. `window`: keys at true distances; `sinks`: LM-Infinite's first tokens, seen from
    `window` on; `group`: Self-Extend's, positions beyond the window are divided by it."""

    window: int
    sinks: int = 0
    group: int = 0

    def parts(self, q: jax.Array, k: jax.Array) -> list[Part]:
        T, S = q.shape[1], k.shape[1]
        q_at, k_at = (jnp.arange(n, dtype=jnp.float32)[None] + n0 for n, n0 in ((T, S - T), (S, 0)))
        near, offset = Between(most=self.window), S - T
        out = [Part(_turned(q, q_at), _turned(k, k_at), near, tiles=near.tiles, offset=offset)]
        if self.sinks:
            far = Between(self.window, first=self.sinks, only_first=True)
            at = jnp.full((1, T), float(self.window)), jnp.zeros((1, S))
        else:
            far = Between(self.window)
            at = q_at // self.group + self.window - self.window // self.group, k_at // self.group
        return [*out, Part(_turned(q, at[0]), _turned(k, at[1]), far, tiles=far.tiles, offset=offset)]

    def __str__(self) -> str:
        return f"window {self.window} + " + (f"{self.sinks} sinks" if self.sinks else f"groups of {self.group}")


def _turned(x_BTHd: jax.Array, at_BT: jax.Array) -> jax.Array:
    """Rotary positions, base 10,000, halves."""
    d = x_BTHd.shape[-1]
    angle = at_BT[:, :, None, None] * 1e4 ** (-jnp.arange(0, d, 2) / d)
    cos, sin, (a, b) = jnp.cos(angle), jnp.sin(angle), jnp.split(x_BTHd.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHd.dtype)


def attend(shape: Shape, how: How, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return branches(shape.parts(q, k), v, how=how)


def shapes(T: int, heads: tuple[int, int] = (H, K), d: int = D, dtype: DTypeLike = jnp.bfloat16) -> tuple[Any, ...]:
    return tuple(jax.ShapeDtypeStruct((1, T, n, d), dtype) for n in (heads[0], heads[1], heads[1]))


def _pair(
    name: str,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    memory: tuple[int, int],
    reference: Callable[..., Any] | None = None,
) -> list[Case]:
    back = None if reference is None else functools.partial(gradient, reference)
    tolerance = 1e-5 if args[0].dtype == jnp.float32 else 1e-2
    return [
        Case(f"{name} forward", run, args, memory[0], reference, tolerance),
        Case(f"{name} backward", functools.partial(gradient, run), args, memory[1], back, tolerance),
    ]


REAL = (Shape(4096, sinks=10), Shape(2048, group=8))


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, forward and backward, to be compiled."""
    size = common.blocks("flash", chip)
    memory = tuple(table.tile_bytes(size["block_q"], size["block_k"], D, 2, back) for back in (False, True))
    return [
        case
        for shape in REAL
        for T in (32768, 131072)
        for case in _pair(
            f"{shape} {T // 1024}k",
            functools.partial(attend, shape, How("tpu", chip)),
            shapes(T),
            (memory[0], memory[1]),
        )
    ]


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the dense union they must equal."""
    out = []
    for shape in (Shape(24, sinks=3), Shape(20, group=4)):
        run = functools.partial(attend, shape, How("interpret", sizes=sized(block_q=32, block_k=16)))
        args = shapes(90, (4, 2), 64, jnp.float32)
        out += _pair(f"{shape}, ragged", run, args, (0, 0), functools.partial(attend, shape, How("reference")))
    return out


def gpu_cases() -> list[Case]:
    """Real sizes by the kernel for Hopper."""
    return [
        case
        for shape in REAL
        for case in _pair(f"{shape} 32k", functools.partial(attend, shape, How("gpu", "h100")), shapes(32768), (0, 0))
    ]


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    for T in (128,) if small else (8192, 32768):
        args = common.normal(np.random.default_rng(0), shapes(T))
        # All logits of 32k tokens do not fit any chip.
        names = [name for name in timing.names() if T <= 8192 or name != "xla"]
        for shape in (Shape(24, sinks=3),) if small else REAL:
            runs = {name: functools.partial(attend, shape, How(name, chip)) for name in names}
            if jax.default_backend() == "gpu":
                runs["cudnn, causal"] = functools.partial(_causal, chip)
            for kind in ("forward", "backward"):
                calls = {
                    name: run if kind == "forward" else functools.partial(gradient, run) for name, run in runs.items()
                }
                if calls:
                    forms = {name: functools.partial(jax.jit(call), *args) for name, call in calls.items()}
                    yield f"{shape} {T} {kind}", forms


def _causal(chip: str | None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return flash(q, k, v, Problem(Between(), causal=True), How("cudnn", chip))


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main("branches", "xla", _forms, argv)


if __name__ == "__main__":
    main()
