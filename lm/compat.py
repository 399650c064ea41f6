"""The only file that looks at library versions (jax 0.10 on Python 3.11 ... jax 0.12 on Python 3.12)."""

from __future__ import annotations

from pathlib import Path

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(p) for p in jax.__version__.split(".")[:3])


def auto_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh whose axes are of type Auto; `jax.make_mesh` gives Explicit axes by default since jax 0.9."""
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=kinds)


def keep_compiled(folder: Path) -> None:
    """Compiled programs are kept in `folder` and found there by the next process."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
