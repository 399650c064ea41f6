"""Experts on several devices: each token goes to its experts' devices and back (GShard, arXiv 2006.16668).

A device sorts its own assignments by expert, sends each other device the rows for the experts there, runs its own
experts on what it got (`lm.ffn.grouped.mixture`) and sends the results back: two all-to-alls a layer, four with the
gradient, of rows ``[P, C, D]`` for P devices; matrices stay where they are, and no device sees all tokens. All-to-alls
have one size, so C rows go to each device, whatever is in them. By default C is as many as there can be: all
assignments of the device, or the capacity of the experts over there if that is fewer; then nothing is dropped that the
router did not drop. Letters as in `lm.ffn.moe`; n tokens of a device.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.ffn.grouped import Activation, Weights, mixture
from lm.parallel.layout import current


def exchanges(E: int, B: int, T: int) -> bool:
    """Whether the current layout puts experts on several devices that hold different tokens."""
    found = current()
    if found is None:
        return False
    layout, sizes = found[0], dict(found[1].shape)
    P, rows, length = (layout.parts(name, sizes) for name in ("experts", "batch", "length"))
    apart = {a for a in layout.axes_of("experts") if sizes[a] > 1} <= set(layout.axes_of("batch"))
    return P > 1 and apart and not (E % P or B % rows or T % length)


def send(
    x_BTD: jax.Array,
    weights: Weights,
    experts_BTk: jax.Array,
    gates_BTk: jax.Array,
    activation: Activation,
    implementation: str,
    per_row: int | None = None,
    in_all: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``y[b, t] = sum_j gates[b, t, j] f_e(x[b, t])`` with e = ``experts[b, t, j]``, E = none, and bool ``[B, T, k]``:
    what was not dropped for want of room. An expert is known to take at most `per_row` tokens of a row, and `in_all` of
    all rows (None = any number)."""
    found = current()
    assert found is not None
    layout, mesh = found
    sizes, k = dict(mesh.shape), experts_BTk.shape[-1]
    rows, length, over = (tuple(a for a in layout.axes_of(n) if sizes[a] > 1) for n in ("batch", "length", "experts"))
    P, E = math.prod(sizes[a] for a in over), weights["up"].shape[0]
    b, n = x_BTD.shape[0] // layout.parts("batch", sizes), x_BTD.shape[1] // layout.parts("length", sizes)
    most = [b * n * k]
    most += [b * per_row * (E // P)] if per_row is not None else []
    most += [in_all * (E // P)] if in_all is not None else []
    C = min(most)
    if layout.exchange is not None:
        C = min(C, math.ceil(layout.exchange * b * n * k / P))

    def local(x: jax.Array, weights: Weights, experts: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_nD, expert_m = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
        order = jnp.argsort(expert_m, stable=True)
        to = expert_m[order] // (E // P)  # P for nobody
        first = jnp.searchsorted(to, jnp.arange(P + 1)).astype(jnp.int32)
        place = jnp.arange(len(order)) - first[to]
        fits = (to < P) & (place < C)
        slot = jnp.where(fits, to * C + place, P * C)
        # Rows of one device after those of another, and one row more for what goes nowhere.
        here = jnp.zeros((P * C + 1,), jnp.int32).at[slot].set((order // k).astype(jnp.int32))[:-1]
        whose = jnp.full((P * C + 1,), E // P, jnp.int32).at[slot].set(expert_m[order] % (E // P))
        whose = whose[:-1]
        sent = jnp.where((whose < E // P)[:, None], x_nD[here], jnp.zeros((), x.dtype))
        got, mine = (_swap(a.reshape(P, C, *a.shape[1:]), over).reshape(a.shape) for a in (sent, whose))
        by_expert = jnp.argsort(mine, stable=True)
        back = jnp.zeros_like(by_expert).at[by_expert].set(jnp.arange(P * C, dtype=by_expert.dtype))
        counts = (mine[:, None] == jnp.arange(E // P)).sum(0).astype(jnp.int32)
        ones = jnp.ones((P * C, 1), x.dtype)
        y = mixture(got, weights, ones, by_expert, back[:, None], counts, activation, implementation)
        y = _swap(y.reshape(P, C, -1), over).reshape(P * C, -1)
        slot_nk = jnp.zeros_like(slot).at[order].set(slot).reshape(-1, k)
        fits_nk = slot_nk < P * C
        gates_nk = jnp.where(fits_nk, gates.reshape(-1, k), 0.0 * gates.reshape(-1, k)).astype(y.dtype)
        out = jnp.einsum("nkd,nk->nd", y[jnp.minimum(slot_nk, P * C - 1)], gates_nk)
        return out.reshape(x.shape), fits_nk.reshape(experts.shape)

    token, expert = PartitionSpec(rows, length), PartitionSpec(over)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(token, expert, token, token),
        out_specs=(token, token),
        axis_names={*rows, *length, *over},
        check_vma=False,
    )(x_BTD, weights, experts_BTk, gates_BTk)


def _swap(x_PC: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """Part p of this device to device p, for the part of device p that is for this one."""
    return jax.lax.all_to_all(x_PC, over, 0, 0, tiled=False)
