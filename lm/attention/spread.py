"""Where attention is mapped by hand: rows and heads over the devices of the layout that a program is traced for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lm.parallel import current


class Spread(NamedTuple):
    """A mesh, the axes that rows are cut over, and those that heads are, None where they do not divide."""

    mesh: Any
    batch_axis: tuple[str, ...]
    head_axis: tuple[str, ...] | None


def spread(rows: int, n_heads: int, n_kv_heads: int) -> Spread | None:
    """None on one device, and where rows do not divide (shapes of parameters are found by tracing one row, which is
    never run)."""
    found = current()
    if found is None:
        return None
    layout, mesh = found
    sizes = dict(mesh.shape)
    if mesh.size == 1 or rows % layout.parts("batch", sizes):
        return None
    cut = layout.axes_of("heads")
    parts = layout.parts("heads", sizes)
    heads = cut == layout.axes_of("kv_heads") and n_heads % parts == n_kv_heads % parts == 0
    # Inside a ring over the length, some axes are taken: `shard_map` there wants the mesh that says so.
    within = jax.sharding.get_abstract_mesh()
    here: Any = within if within.axis_names == mesh.axis_names else mesh
    return Spread(here, layout.axes_of("batch"), cut if heads else None)
