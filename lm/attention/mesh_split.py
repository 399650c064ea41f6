"""Where attention is mapped by hand: rows and heads over the devices of the layout that a program is traced for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lm.attention.branches import Context
from lm.sharding import current


class MeshSplit(NamedTuple):
    """A mesh, the axes that rows are cut over, and those that heads are, None where they do not divide."""

    mesh: Any
    batch_axis: tuple[str, ...]
    head_axis: tuple[str, ...] | None


def mesh_split(ctx: Context) -> MeshSplit | None:
    """None on one device, and where rows do not divide (shapes of parameters are found by tracing one row, which is
    never run)."""
    found = current()
    if found is None:
        return None
    (layout, mesh), n_heads, n_kv_heads = found, ctx.q_BTHd.shape[2], ctx.k_BSKd.shape[2]
    sizes = dict(mesh.shape)
    if mesh.size == 1 or ctx.q_BTHd.shape[0] % layout.parts("batch", sizes):
        return None
    cut = layout.axes_of("heads")
    parts = layout.parts("heads", sizes)
    heads = cut == layout.axes_of("kv_heads") and n_heads % parts == n_kv_heads % parts == 0
    # Inside a ring over the length, some axes are taken: `shard_map` there wants the mesh that says so.
    within = jax.sharding.get_abstract_mesh()
    here: Any = within if within.axis_names == mesh.axis_names else mesh
    return MeshSplit(here, layout.axes_of("batch"), cut if heads else None)
