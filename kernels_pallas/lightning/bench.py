"""What `kernels_pallas.check` compiles and runs of `lightning`; as a program, times.

``python -m kernels_pallas.lightning.bench``: the chunked form in XLA operations, and the kernel where there is a TPU or
a Hopper GPU, forward and in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import timing
from kernels_pallas.common import GPUS, Case, How, blocks, sized
from kernels_pallas.lightning import gpu, tpu
from kernels_pallas.lightning.api import NAME, lightning

# T, H, D, E and the dtype; one row of the batch.
Size = tuple[int, int, int, int, Any]
REAL: tuple[Size, ...] = (
    *((T, 32, 128, 128, jnp.bfloat16) for T in (8192, 32768, 131072)),
    (8192, 32, 64, 64, jnp.bfloat16),
    (8192, 32, 96, 96, jnp.bfloat16),
    (8192, 16, 256, 256, jnp.bfloat16),
    (8000, 32, 128, 128, jnp.bfloat16),  # the last chunk is not full
    (8192, 32, 128, 128, jnp.float32),
)
GPU = tuple(size for size in REAL if size[-1] == jnp.bfloat16 and size[2] <= gpu.STATE)
SMALL: tuple[Size, ...] = ((100, 2, 16, 16, jnp.float32), (37, 2, 8, 24, jnp.float32), (40, 2, 16, 16, jnp.bfloat16))


def gradients(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, state: jax.Array, how: How) -> Any:
    """Both results and the gradients of their sum to q, k, v and the state: the training call."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lightning(q, k, v, decay, state, how)

    out, pull = jax.vjp(both, q, k, v, state)
    return out, pull(jax.tree.map(jnp.ones_like, out))


KINDS: dict[str, Callable[..., Any]] = {"forward": lightning, "backward": gradients}


def _name(size: Size, kind: str) -> str:
    T, H, D, E, dtype = size
    return f"{T}x{H}x{D}{'' if D == E else f':{E}'}{'' if dtype == jnp.bfloat16 else ' float32'} {kind}"


def _shapes(size: Size) -> tuple[Any, ...]:
    T, H, D, E, dtype = size
    array: Any = jax.ShapeDtypeStruct
    q = array((1, T, H, D), dtype)
    return q, q, array((1, T, H, E), dtype), array((H,), jnp.float32), array((1, H, D, E), jnp.float32)


def _draw(rng: np.random.Generator, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal values and a normal state; decays from slow to fast, the first head without."""
    *arrays, decay, state = (jnp.asarray(rng.standard_normal(x.shape) / 8, x.dtype) for x in shapes)
    heads = jnp.arange(decay.shape[0])
    return *arrays, jnp.where(heads == 0, 1.0, jnp.exp(-jnp.exp2(-heads / 4.0))).astype(decay.dtype), state


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, forward and backward, to be compiled."""
    chunk = blocks(NAME, chip)["chunk"]
    out = []
    for size in REAL:
        for kind, fn in KINDS.items():
            run = functools.partial(fn, how=How("tpu", chip))
            out.append(Case(_name(size, kind), run, _shapes(size), tpu.memory(chunk, *size[2:]), draw=_draw))
    return out


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the loop over tokens they must equal."""
    out = []
    for size in SMALL:
        for kind, fn in KINDS.items():
            run = functools.partial(fn, how=How("interpret", sizes=sized(chunk=16)))
            truth = functools.partial(fn, how=How("reference"))
            tolerance = 1e-5 if size[-1] == jnp.float32 else 1e-2
            out.append(Case(_name(size, kind), run, _shapes(size), 0, truth, tolerance, _draw))
    size = (100, 2, 64, 64, jnp.bfloat16)
    run, truth = (functools.partial(lightning, how=How(name)) for name in ("interpret_gpu", "reference"))
    return [*out, Case(f"{_name(size, 'forward')}, gpu", run, _shapes(size), 0, truth, 1e-2, _draw)]


def gpu_cases() -> list[Case]:
    """Real sizes for Mosaic GPU, the shortest also in training; XLA operations in chunks."""
    out = []
    for form, size, kind in (
        *(("gpu", size, "forward") for size in GPU),
        ("gpu", GPU[0], "backward"),
        *(("xla", GPU[0], kind) for kind in KINDS),
    ):
        run = functools.partial(KINDS[kind], how=How(form, "h100" if form == "gpu" else None))
        tile = gpu.memory(size[2], blocks(NAME, "h100")["stages"]) if form == "gpu" else 0
        out.append(Case(f"{_name(size, kind)}, {form}", run, _shapes(size), tile, draw=_draw))
    return out


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    for size in SMALL if small else REAL:
        arrays = _draw(np.random.default_rng(0), _shapes(size))
        hopper = ("gpu",) if chip in GPUS and size in GPU else ()
        for kind, fn in KINDS.items():
            yield (
                _name(size, kind),
                {
                    name: functools.partial(jax.jit(functools.partial(fn, how=How(name, chip))), *arrays)
                    for name in (*timing.names(), *hopper)
                },
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main(NAME, "xla", _forms, argv)


if __name__ == "__main__":
    main()
