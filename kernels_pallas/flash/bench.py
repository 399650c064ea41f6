"""What `kernels_pallas.check` compiles and runs of `flash`; as a program, times.

``python -m kernels_pallas.flash.bench``: forward and backward of all logits at once in XLA operations against the
kernel of this machine; on a GPU against cuDNN too, which serves plain causal masks only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas import common, timing
from kernels_pallas.common import Case, How, sized
from kernels_pallas.flash import gpu, table
from kernels_pallas.flash.api import flash
from kernels_pallas.flash.problem import Problem

H, K, D = 32, 8, 128  # query heads, key heads, head width of the real sizes


@dataclass(frozen=True)
class Band:
    """Causal, at most `window` keys back (None = all) or among the first `sinks`: the Λ shape."""

    window: int | None = None
    sinks: int = 0

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return (k <= q) if self.window is None else (k <= q) & ((q - k < self.window) | (k < self.sinks))

    def tiles(self, n_queries: int, n_keys: int, block_q: int, block_k: int) -> np.ndarray:
        """The non-empty tiles ``[n, 3]``; queries are the last `n_queries` keys."""
        q0 = np.arange(0, n_queries, block_q)[:, None] + n_keys - n_queries
        k0 = np.arange(0, n_keys, block_k)[None]
        q1, k1 = np.minimum(q0 + block_q, n_keys) - 1, k0 + block_k - 1
        window = n_keys + 1 if self.window is None else self.window
        some = (k0 <= q1) & ((q0 - k1 < window) | (k0 < self.sinks))
        whole = (k1 <= q0) & ((q1 - k0 < window) | (k1 < self.sinks)) & (k1 < n_keys)
        i, j = np.nonzero(some)
        return np.stack([i, j, whole[some]], 1).astype(np.int32)


def _attend(how: How, mask: Band, features: frozenset[str], *args: jax.Array, causal: bool = False) -> Any:
    """`flash` of q, k, v and what `features` name, in their order: index, segments, slopes, sinks."""
    q, k, v, *rest = args
    extra: dict[str, Any] = {}
    for name in ("index", "segments"):
        if name in features:
            extra[name], rest = (rest[0], rest[1]), rest[2:]
    if "slopes" in features:
        extra["positions"] = (
            jnp.arange(q.shape[1], dtype=jnp.float32)[None],
            jnp.arange(k.shape[1], dtype=jnp.float32)[None],
        )
        extra["slopes_H"], rest = rest[0], rest[1:]
    if "sinks" in features:
        extra["sinks_H"], rest = rest[0], rest[1:]
    if "softcap" in features:
        extra["softcap"] = 30.0
    tiles = None if "index" in features else mask.tiles
    problem = Problem(mask, tiles=tiles, offset=k.shape[1] - q.shape[1], causal=causal, **extra)
    return flash(q, k, v, problem, how)


def _shapes(
    lengths: tuple[int, int], heads: tuple[int, int], d: int, dtype: DTypeLike, features: frozenset[str]
) -> tuple[Any, ...]:
    """Of one row: `lengths` of queries and keys, `heads` of queries and keys."""
    x = jax.ShapeDtypeStruct
    B, (T, S) = 1, lengths
    n, kv = heads
    out = [x((B, T, n, d), dtype), x((B, S, kv, d), dtype), x((B, S, kv, d), dtype)]
    for name in ("index", "segments"):
        if name in features:
            out += [x((B, T), jnp.int32), x((B, S), jnp.int32)]
    out += [x((n,), jnp.float32) for name in ("slopes", "sinks") if name in features]
    return tuple(out)


def gradient(attend: Callable[..., Any], *args: jax.Array) -> Any:
    """Gradients of a loss that weighs output and log-sum-exp unevenly, to every float argument."""
    floats = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(*args: jax.Array) -> jax.Array:
        out, lse = attend(*args)
        return jnp.sin(3 * out.astype(jnp.float32)).sum() + jnp.where(lse > common.NEG / 2, jnp.cos(lse), 0.0).sum()

    return jax.grad(loss, floats)(*args)


def _pair(case: Case, memory: tuple[int, int]) -> list[Case]:
    """The case forward, and backward. `memory`: of either."""
    back = None if case.reference is None else functools.partial(gradient, case.reference)
    backward = functools.partial(gradient, case.fn)
    return [
        replace(case, name=f"{case.name} forward", tile_bytes=memory[0]),
        replace(case, name=f"{case.name} backward", fn=backward, tile_bytes=memory[1], reference=back),
    ]


def _memory(size: dict[str, int], d: int, dtype: DTypeLike) -> tuple[int, int]:
    """Of a TPU kernel, forward and backward."""
    n = jnp.dtype(dtype).itemsize
    forward, backward = (
        table.tile_bytes(size["block_q"], size["block_k"], d, n, backward) for backward in (False, True)
    )
    return forward, backward


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, forward and backward, to be compiled."""
    size = common.blocks("flash", chip)
    band, bf16 = Band(4096, 16), jnp.bfloat16
    sizes: list[tuple[str, Band, tuple[int, int], int, Any, set[str]]] = [
        ("causal 8k", Band(), (8192, 8192), D, bf16, set()),
        ("causal 32k", Band(), (32768, 32768), D, bf16, set()),
        ("causal 128k", Band(), (131072, 131072), D, bf16, set()),
        ("window + sinks 32k", band, (32768, 32768), D, bf16, set()),
        ("window + sinks 128k", band, (131072, 131072), D, bf16, set()),
        ("slopes, soft-cap, sinks 8k", Band(), (8192, 8192), D, bf16, {"slopes", "softcap", "sinks"}),
        ("packed 8k", Band(), (8192, 8192), D, bf16, {"index", "segments"}),
        ("float32 8k", Band(), (8192, 8192), D, jnp.float32, set()),
        ("1 query, 32k keys", Band(), (1, 32768), D, bf16, {"index"}),
        *[(f"width {d} 8k", Band(), (8192, 8192), d, bf16, set()) for d in (64, 96, 256)],
    ]
    out = []
    for name, mask, (T, S), d, dtype, features in sizes:
        names = frozenset(features)
        attend = functools.partial(_attend, How("tpu", chip), mask, names)
        out += _pair(Case(name, attend, _shapes((T, S), (H, K), d, dtype, names)), _memory(size, d, dtype))
    return out


def _draw(rng: np.random.Generator, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal floats; each pair of integers is two documents in a row, the queries being the last of the keys."""
    out = []
    for x in shapes:
        if jnp.issubdtype(x.dtype, jnp.floating):
            out.append(jnp.asarray(rng.standard_normal(x.shape), x.dtype))
            continue
        at = np.arange(100 - x.shape[1], 100)
        first = not any(a.dtype == jnp.int32 for a in out) or sum(a.dtype == jnp.int32 for a in out) == 1
        row = np.where(at < 60, at, at - 60) if first else (at >= 60)
        out.append(jnp.asarray(np.broadcast_to(row, x.shape), jnp.int32))
    return tuple(out)


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the reference they must equal."""
    sizes: list[tuple[str, Band, tuple[int, int], int, Any, set[str]]] = [
        ("causal, ragged", Band(), (100, 100), 64, jnp.float32, set()),
        ("window + sinks", Band(24, 3), (100, 100), 64, jnp.float32, set()),
        ("slopes, soft-cap, sinks", Band(), (100, 100), 96, jnp.float32, {"slopes", "softcap", "sinks"}),
        ("packed", Band(40), (100, 100), 128, jnp.float32, {"index", "segments"}),
        ("last 37 queries", Band(), (37, 100), 64, jnp.float32, set()),
        ("bfloat16", Band(), (100, 100), 64, jnp.bfloat16, set()),
    ]
    out = []
    for name, mask, (T, S), d, dtype, features in sizes:
        names = frozenset(features)
        size = {"block_q": 32, "block_k": 16}
        attend = functools.partial(_attend, How("interpret", sizes=sized(**size)), mask, names)
        reference = functools.partial(_attend, How("xla"), mask, names)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        args = _shapes((T, S), (4, 2), d, dtype, names)
        case = Case(name, attend, args, reference=reference, tolerance=tolerance, draw=_draw)
        out += _pair(case, _memory(size, d, dtype))
    for name, mask, d, features in (
        ("gpu, window + sinks", Band(70, 3), 64, set()),
        ("gpu, slopes, soft-cap, sinks", Band(), 96, {"slopes", "softcap", "sinks"}),
        ("gpu, packed", Band(40), 128, {"index", "segments"}),
    ):
        attend = functools.partial(_attend, How("interpret_gpu", "h100"), mask, frozenset(features))
        truth = functools.partial(_attend, How("reference"), mask, frozenset(features))
        args = _shapes((100, 150), (4, 2), d, jnp.bfloat16, frozenset(features))
        case = Case(name, attend, args, reference=truth, tolerance=1e-2, draw=_draw)
        out += _pair(case, gpu.memory(d, common.blocks("flash", "h100")))
    return out


def gpu_cases() -> list[Case]:
    """The kernel for Hopper at real sizes; XLA, 'auto' and cuDNN, which can only be lowered where it is, on a GPU."""
    args = _shapes((4096, 4096), (H, K), D, jnp.bfloat16, frozenset())
    cudnn = ("cudnn",) if jax.default_backend() == "gpu" else ()
    out = []
    for name in ("xla", "auto", *cudnn):
        attend = functools.partial(_attend, How(name), Band(), frozenset(), causal=True)
        out += _pair(Case(f"causal 4k, {name}", attend, args), (0, 0))
    band, size = Band(4096, 16), common.blocks("flash", "h100")
    sizes: list[tuple[str, Band, int, int, set[str]]] = [
        ("causal 8k", Band(), 8192, D, set()),
        ("causal 32k", Band(), 32768, D, set()),
        ("causal 128k", Band(), 131072, D, set()),
        ("window + sinks 32k", band, 32768, D, set()),
        ("window + sinks 128k", band, 131072, D, set()),
        ("slopes, soft-cap, sinks 8k", Band(), 8192, D, {"slopes", "softcap", "sinks"}),
        ("packed 8k", Band(), 8192, D, {"index", "segments"}),
        *[(f"width {d} 8k", Band(), 8192, d, set()) for d in (64, 96, 256)],
    ]
    for name, mask, T, d, features in sizes:
        names = frozenset(features)
        attend = functools.partial(_attend, How("gpu", "h100"), mask, names)
        args = _shapes((T, T), (H, K), d, jnp.bfloat16, names)
        out += _pair(Case(f"{name}, gpu", attend, args), gpu.memory(d, size))
    return out


def _no_lse(attend: Callable[..., Any], *args: jax.Array) -> Any:
    """Gradients of a sum over the output alone to q, k and v."""
    return jax.grad(lambda *x: jnp.sin(attend(*x)[0].astype(jnp.float32)).sum(), (0, 1, 2))(*args)


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    on_gpu, dtype = jax.default_backend() == "gpu", jnp.float32 if small else jnp.bfloat16
    T = 100 if small else 4096
    sizes = [("causal", Band(), T), ("window + sinks", Band(T // 8, 16), T)]
    if on_gpu and not small:
        sizes += [("causal", Band(), n * T) for n in (2, 4, 8)] + [("window + sinks", Band(4096, 16), 8 * T)]
    for name, mask, T in sizes:
        args = _draw(np.random.default_rng(0), _shapes((T, T), (H, K), D, dtype, frozenset()))
        serving = {
            "xla": T <= 8192,  # all logits of 32 heads: 8 GiB at 8k, 128 GiB at 32k
            "gpu": chip in common.GPUS and not small,
            "cudnn": on_gpu and not small and mask == Band(),
        }
        for kind in ("forward", "backward"):
            forms = {}
            for form in (*timing.names(), "cudnn"):
                if serving.get(form, True):
                    attend = functools.partial(_attend, How(form, chip), mask, frozenset(), causal=mask == Band())
                    call = attend if kind == "forward" else functools.partial(_no_lse, attend)
                    forms[form] = functools.partial(jax.jit(call), *args)
            if on_gpu and not small and importlib.util.find_spec("tokamax"):
                peer = functools.partial(_tokamax, mask)
                call = peer if kind == "forward" else functools.partial(_no_lse, peer)
                forms["tokamax"] = functools.partial(jax.jit(call), *args)
            yield f"{name} {T} {kind}", forms


def _tokamax(mask: Band, *args: jax.Array) -> Any:
    """The library where it is installed (`pip install tokamax`); it knows no sinks, and a window leaves them out."""
    import tokamax  # type: ignore[import-not-found]

    window = None if mask.window is None else (mask.window - 1, 0)
    return (tokamax.dot_product_attention(*args, is_causal=True, local_window_size=window),)


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main("flash", "cudnn" if jax.default_backend() == "gpu" else "xla", _forms, argv)


if __name__ == "__main__":
    main()
