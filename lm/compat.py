"""The only file that looks at library versions (jax 0.10 on Python 3.11 ... jax 0.12 on Python 3.12)."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

JAX_VERSION: tuple[int, ...] = tuple(int(p) for p in jax.__version__.split(".")[:3])


# Flags for XLA_FLAGS with which a CPU program compiles in half the time (jax 0.10) or a tenth quicker, and runs slower.
# Later versions do not know the first one, and end the process over it.
QUICK_TO_COMPILE: tuple[str, ...] = (
    *(("--xla_cpu_use_fusion_emitters=false",) if JAX_VERSION < (0, 11) else ()),
    "--xla_cpu_parallel_codegen_split_count=1",
)


def auto_mesh(shape: tuple[int, ...], names: tuple[str, ...], devices: Any = None) -> jax.sharding.Mesh:
    """A mesh whose axes are of type Auto (`devices`: None = all); `jax.make_mesh` gives Explicit ones since jax 0.9."""
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    if devices is not None and len({getattr(d, "slice_index", None) for d in devices}) > 1:
        # Slice by slice, as they come: the first axes go between slices.
        return jax.sharding.Mesh(np.asarray(devices).reshape(shape), names, axis_types=kinds)
    try:
        return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no side of the machine, or product of sides, is as long as an axis: sides are split
        from jax.experimental import mesh_utils

        try:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except TypeError:  # not found: 8 x 35 x 8 in 4 x 20 x 28. Devices are listed along rows of neighbours
            grid = np.asarray(devices).reshape(shape)
        return jax.sharding.Mesh(grid, names, axis_types=kinds)


def on_tpu_vm() -> bool:
    """Whether this machine has TPUs and their library; starts no backend, for which there is no public name."""
    from jax._src import cloud_tpu_init

    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def keep_compiled(folder: Path) -> None:
    """Compiled programs are kept in `folder` and found there by the next process, unless the environment already names
    a place for them (``JAX_COMPILATION_CACHE_DIR``)."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def times_int8(x: jax.Array, q: jax.Array) -> jax.Array:
    """``x[M, in] @ q[out, in].T`` float32, for int8 `q`.

    Each XLA has one form of this product whose CPU code converts int8 in registers, and others that are 2 to 40 times
    slower. Inside a loop, the barrier keeps the conversion there: it would be moved out, and floats be read instead.
    """
    x, q = jax.lax.optimization_barrier((x, q))
    if JAX_VERSION < (0, 11):
        return jnp.matmul(x, q.astype(x.dtype).T, preferred_element_type=jnp.float32)
    return jnp.einsum("mi,oi->mo", x, q.astype(x.dtype), preferred_element_type=jnp.float32)


def gpu_load(ref: Any, index: Any, **how: Any) -> jax.Array:
    """``ref[index]`` in a Mosaic GPU kernel; later versions take the index by `ref.at` alone."""
    import inspect

    from jax.experimental.pallas import mosaic_gpu

    if "idx" in inspect.signature(mosaic_gpu.load).parameters:
        return mosaic_gpu.load(ref, index, **how)
    return mosaic_gpu.load(ref.at[index], **how)  # type: ignore[call-arg]


def gpu_transposed(ref: Any) -> Any:
    """A reference of a Mosaic GPU kernel with its two axes exchanged; later versions ask the reference itself."""
    if JAX_VERSION >= (0, 11):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.transpose_ref(ref, (1, 0))


def compile_interpreted_threads_once() -> None:
    """Interpreted GPU kernels: jax 0.10 compiles the body for every thread of every grid point, jax 0.12 once."""
    if JAX_VERSION >= (0, 11):
        return
    from jax._src.pallas.mosaic.interpret import thread_map

    thread_map._run_jaxpr = _run_thread


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=8)
def _program(jaxpr: Any, *shapes: Any) -> Any:
    def run(consts: Any, *args: Any) -> None:
        jax.core.eval_jaxpr(jaxpr, consts, *args)

    consts, args = shapes[: len(jaxpr.constvars)], shapes[len(jaxpr.constvars) :]
    return jax.jit(run).lower(list(consts), *args).compile()


def _run_thread(jaxpr: Any, consts: Any, *args: Any) -> None:
    shapes = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (*jaxpr.constvars, *jaxpr.invars))
    with _LOCK:
        program = _program(jaxpr, *shapes)
    program(list(consts), *args)
