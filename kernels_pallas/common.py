"""What the kernels share: chips and their block sizes, how an implementation is chosen, and the cases of a check."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from lm.errors import UserError, unknown

NEG = -1e30  # finite stand-in for -inf: exp(NEG - x) is 0 and NEG - NEG is 0, never NaN
MIB = 2**20
STATIC = {"static": True}  # metadata of a field that is no array, in a dataclass that is a pytree

Index = jax.Array | int  # a number that is known, or is known when the program runs
Pair = tuple[jax.Array, jax.Array]  # of queries, of keys
Axes = str | tuple[str, ...] | None  # axes of a mesh
Sizes = tuple[tuple[str, int], ...]  # block sizes by name
Interpret = bool | pltpu.InterpretParams


class Shaped(Protocol):
    """An array, or the shape and dtype of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...


class View(Protocol):
    """``ref.at``: indexed, it is a part of the reference."""

    def __getitem__(self, index: object, /) -> Ref: ...


class Ref(Protocol):
    """A reference in a kernel body: memory that is read, written and cut, or a barrier."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def at(self) -> View: ...

    def __getitem__(self, index: object, /) -> jax.Array: ...

    def __setitem__(self, index: object, value: object, /) -> None: ...


@dataclass(frozen=True)
class Chip:
    """A TPU generation: a topology that ahead-of-time compilation knows, and the fast memory a program may ask for.

    `vmem`: bytes a kernel may use (`vmem_limit_bytes`), below what the chip has because XLA keeps some of it. The chip
    is always an argument, never looked up: a program may be compiled for a chip that is not there.
    """

    topology: str
    vmem: int


CHIPS = {
    "v4": Chip("v4:2x2x1", 16 * MIB),
    "v5e": Chip("v5e:2x2", 64 * MIB),
    "v5p": Chip("v5p:2x2x1", 64 * MIB),
    "v6e": Chip("v6e:2x2", 64 * MIB),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU generation: its compute capability and the shared memory a block of threads may take, bytes."""

    capability: str
    smem: int


GPUS = {
    "h100": Gpu("9.0", 227 * 1024)
}  # H100, H200, GH200: kernels use its wgmma and TMA, no other generation has both

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def chip(device: jax.Device) -> str | None:
    """The name in `CHIPS` or `GPUS` of a device, a mesh's abstract one too, or None. For callers, not for kernels."""
    if device.platform == "gpu":
        capability = getattr(device, "compute_capability", None)
        return next((name for name, gpu in GPUS.items() if gpu.capability == capability), None)
    return KINDS.get(device.device_kind) if device.platform == "tpu" else None


# kernel -> chip -> block sizes by name; "default" serves chips without a row. Sizes a caller gives win. Chosen by what
# fits and by the width of the matrix unit (v6e: 256, the others: 128); not tuned, for no chip was at hand.
BLOCKS: dict[str, dict[str, dict[str, int]]] = {
    "flash": {
        "default": {"block_q": 512, "block_k": 512},
        "v5e": {"block_q": 512, "block_k": 1024},
        "v5p": {"block_q": 512, "block_k": 1024},
        "v6e": {"block_q": 512, "block_k": 1024},
        "h100": {"block_q": 128, "block_k": 128},
    },
    # Tokens of a chunk; on a GPU also the chunks in shared memory at a time.
    "lightning": {"default": {"chunk": 128}, "v6e": {"chunk": 256}, "h100": {"chunk": 64, "stages": 2}},
    # Rows and outputs of a grid step, at most; fewer where a step would take more than `mib` of fast memory.
    "int4_matmul": {
        "default": {"tile_m": 128, "tile_n": 512, "mib": 14},
        "v5e": {"tile_m": 128, "tile_n": 512, "mib": 24},
        "v5p": {"tile_m": 256, "tile_n": 512, "mib": 24},
        "v6e": {"tile_m": 256, "tile_n": 512, "mib": 24},
        # `stages` of copies under way in a block of threads; inputs are split until there are `ctas` blocks.
        "h100": {"tile_m": 128, "tile_n": 128, "stages": 4, "ctas": 264},
    },
    # Slots of the cache per grid step, at most; fewer where many queries share them.
    "tree_decode": {
        "default": {"tile_s": 512},
        "v5e": {"tile_s": 1024},
        "v5p": {"tile_s": 1024},
        "v6e": {"tile_s": 1024},
        # `stages` of copies under way at most; the cache is split until `ctas` blocks of threads have work.
        "h100": {"tile_s": 128, "stages": 4, "ctas": 132},
    },
    # Listed blocks of a grid step, at most; fewer where they would take more than `mib`. `kib` of scalar memory for the
    # lists of one call. On a GPU: keys of a tile at most, tiles in shared memory at a time, and blocks of threads below
    # which lists are cut into parts (two to each of 132 multiprocessors).
    "block_table": {
        "default": {"entries": 4, "mib": 12, "kib": 256},
        "h100": {"tile": 128, "stages": 2, "fill": 264},
    },
}


def blocks(kernel: str, chip: str | None = None, **given: int | None) -> dict[str, int]:
    """Block sizes of `kernel` on `chip`; those `given` that are not None win. `KeyError` for an unknown size."""
    rows = BLOCKS[kernel]
    out = dict(rows.get(chip or "default", rows["default"]))
    for name, value in given.items():
        own = out[name]
        out[name] = own if value is None else value
    return out


@dataclass(frozen=True)
class How:
    """How a kernel runs. No field changes what it computes, but for rounding.

    `implementation`: one of these names; a kernel has those of its `forms`.

    - ``auto``: see `run`.
    - ``tpu``: Mosaic TPU. ``gpu``: Mosaic GPU, for Hopper. ``cudnn``: NVIDIA's library, where it serves.
    - ``interpret``, ``interpret_gpu``: the TPU and the GPU kernel interpreted, slowly.
    - ``xla``: plain XLA operations. ``reference``: the truth, in float32.

    `chip`: a row of `BLOCKS`. `sizes` win over that row; `sized` makes them. `interpret`: what `pallas_call` takes
    under ``interpret``, `strict()` for instance; an implementation that is called by itself is compiled if it is False.

    With a `mesh` the call sits in `jax.shard_map`: rows of the batch over `batch_axis`, heads over `head_axis` (a name,
    several, or None). Only kernels of `MAPPED` take one.
    """

    implementation: str = "auto"
    chip: str | None = None
    sizes: Sizes = ()
    interpret: Interpret = True
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
    batch_axis: Axes = "data"
    head_axis: Axes = None

    @property
    def compiled(self) -> How:
        """The same, not interpreted."""
        return dataclasses.replace(self, interpret=False)

    @property
    def hopper(self) -> str:
        """The chip if it is a GPU, else the GPU that the kernels are written for."""
        return self.chip if self.chip in GPUS else "h100"

    def size(self, name: str) -> int | None:
        """The block size that the caller gave, or None."""
        return dict(self.sizes).get(name)

    def blocks(self, kernel: str, chip: str | None) -> dict[str, int]:
        """Block sizes of `kernel` on `chip`. Sizes given for another kind of chip are left out."""
        row = blocks(kernel, chip)
        return row | {name: size for name, size in self.sizes if name in row}


AUTO = How()
MAPPED = ("flash", "branches", "block_table")  # kernels that map themselves over a mesh


def sized(**sizes: int | None) -> Sizes:
    """`How.sizes` by name; None leaves a size to the table."""
    return tuple((name, size) for name, size in sizes.items() if size is not None)


def vmem(chip: str | None) -> int | None:
    """`vmem_limit_bytes` on `chip`, or the compiler's own limit."""
    return CHIPS[chip].vmem if chip in CHIPS else None


def check_how(kernel: str, how: How) -> None:
    """The chip, the names of block sizes and the mesh.

    The chip's name selects block sizes. It is said, never looked up, because programs are compiled elsewhere.
    """
    if how.chip is not None and how.chip not in CHIPS and how.chip not in GPUS:
        raise unknown(f"{kernel}: chip", how.chip, (*CHIPS, *GPUS))
    names = sorted({name for row in BLOCKS[kernel].values() for name in row})
    for name, _ in how.sizes:
        if name not in names:
            raise unknown(f"{kernel}: sizes", name, names)
    if how.mesh is not None and kernel not in MAPPED:
        raise UserError(f"{kernel}: a mesh; valid: none, and jax.shard_map around the call")


def known_dtype(kernel: str, **arrays: Shaped) -> None:
    """Every array is bfloat16 or float32, all of them the same."""
    kinds = {name: str(a.dtype) for name, a in arrays.items()}
    if len(set(kinds.values())) > 1 or not set(kinds.values()) <= {"bfloat16", "float32"}:
        found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UserError(f"{kernel}: found {found}; valid: all bfloat16 or all float32")


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Products of float32 arrays are float32 products, on a TPU too."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def run(
    kernel: str,
    how: How,
    forms: Mapping[str, Callable[..., Any]],
    refusals: Mapping[str, str | None],
    *args: object,
) -> Any:
    """Calls the implementation named, or for 'auto' the best one that serves the call.

    `forms`: functions of `args` by name, 'xla' among them. `refusals` says of a form why it cannot serve the call.
    'auto' becomes 'tpu' where the program is lowered for a TPU, whatever machine lowers it. Where it is lowered for
    CUDA, 'auto' becomes 'cudnn', else 'gpu' if the chip is one it is written for. It becomes 'xla' elsewhere, and in
    place of what is refused.
    Raises UserError for an unknown name, or a form asked for by name that cannot serve the call.
    """
    implementation = how.implementation
    if implementation not in ("auto", *forms):
        raise unknown(f"{kernel}: implementation", implementation, ("auto", *forms))
    if reason := refusals.get(implementation):
        raise UserError(f"{kernel}: implementation {implementation!r} cannot serve this call: {reason}; use 'auto'")
    if implementation != "auto":
        return forms[implementation](*args)

    def first(*names: str) -> Callable[..., Any]:
        return next((forms[name] for name in names if name in forms and not refusals.get(name)), forms["xla"])

    tpu, cuda = first("tpu"), first("cudnn", *(("gpu",) if how.chip in GPUS else ()))
    if tpu is cuda is forms["xla"]:
        return tpu(*args)
    return jax.lax.platform_dependent(*args, tpu=tpu, cuda=cuda, default=forms["xla"])


def kernel_forms(
    tpu: Callable[..., Any], gpu: Callable[..., Any], how: How, refusals: tuple[str | None, str | None]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str | None]]:
    """Forms and refusals of the two kernels, compiled and interpreted, for `run`.

    `tpu` and `gpu` take `how` by name, besides the arguments of the call. `refusals`: of the TPU's, of the GPU's.
    """
    on_tpu, on_gpu = refusals
    forms: dict[str, Callable[..., Any]] = {
        "tpu": functools.partial(tpu, how=how.compiled),
        "interpret": functools.partial(tpu, how=how),
        "gpu": functools.partial(gpu, how=how.compiled),
        "interpret_gpu": functools.partial(gpu, how=how),
    }
    return forms, {"tpu": on_tpu, "interpret": on_tpu, "gpu": on_gpu, "interpret_gpu": on_gpu}


def strict() -> pltpu.InterpretParams:
    """The TPU interpreter that looks for races (on two cores), reads outside a buffer and memory nobody wrote (NaN)."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )


def normal(rng: np.random.Generator, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Standard normal arrays of the given shapes and dtypes; trees stay trees."""
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


@dataclass(frozen=True)
class Case:
    """One line of a check: `fn` of arrays shaped like `args`, a tuple of trees.

    `tile_bytes`: fast memory of one grid step (blocks in flight, scratch, intermediate tiles), an estimate. Small cases
    also have `reference`, which `fn` must equal to `tolerance` (RMS ratio over every output), on what `draw` returns.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    tile_bytes: int = 0
    reference: Callable[..., Any] | None = None
    tolerance: float = 1e-5
    draw: Callable[[np.random.Generator, tuple[Any, ...]], tuple[Any, ...]] = field(default=normal)


def mapped(
    fn: Callable[..., Any],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    in_specs: Iterable[object],
    out_specs: Iterable[object],
) -> Callable[..., Any]:
    """`fn` for the part of every device of `mesh`: `jax.shard_map` over all axes that are not taken already.

    Around a kernel no axis may be left to the compiler. The specs are one tree of `PartitionSpec` per argument and
    result of `fn`.
    """
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)
