"""Ring attention (arXiv 2310.01889): where a layout cuts the length, keys and values go round, queries stay.

Device i of n holds part i of the tokens. In hop h it meets the keys of part ``i - h``: it attends to them with the
backend that attends to all keys elsewhere, and joins the result to what it has by log-sum-exp (`branches.merge`). What
a pair of tokens is worth follows from the tokens' own indices, positions and segments, which travel with the keys, so
masks, windows, sinks, biases, soft caps and a branch's positions mean what they mean on one device. Keys travel
unrotated: every branch rotates them where they are.

Hops in which no device sees anything are not made (a window of w tokens needs ``1 + ceil((w - 1) / part)`` hops), and
a device that sees nothing of a part does not compute. The gradient goes round a second time and recomputes each hop
from the final log-sum-exp, with the gradients of keys and values travelling along, so a device never holds more than
two parts of either. Under a causal mask the last device has work in all hops and the first in one; parts are not
interleaved to even that out (striped attention, arXiv 2311.09431).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.attention.branches import NEG, AnyBranch, BlockBranch, Branch, Context, Tokens, merge
from lm.attention.masks import Mask, Tile
from lm.errors import UserError
from lm.parallel.layout import current

Local = Callable[[Context, jax.Array, tuple[AnyBranch, ...]], tuple[jax.Array, jax.Array]]


def refusal(branches: Sequence[AnyBranch]) -> str | None:
    """Why these branches cannot be taken part by part; None if they can."""
    for branch in branches:
        if isinstance(branch, BlockBranch):
            return "its keys are listed by block, anywhere in the text"
        if branch.gather_BHTn is not None:
            return "its keys are listed one by one, anywhere in the text"
        if branch.rows is not None:
            return "a branch is for the last queries only"
    return None


def wanted(ctx: Context, branches: Sequence[AnyBranch]) -> bool:
    """Whether the current layout makes a ring of this call.

    Raises `UserError` where it does and the branches cannot.
    """
    found = current()
    if found is None or found[0].attention != "ring":
        return False
    n, T = found[0].parts("length", dict(found[1].shape)), ctx.q_BTHd.shape[1]
    if n == 1 or T % n or T != ctx.k_BSKd.shape[1]:  # a single token only says what shapes are
        return False
    why = refusal(branches)
    if why is not None:
        raise UserError(
            f"train.mesh.attention: ring is impossible for the model's pattern ({why}); valid: gather, which brings "
            "all keys to every device"
        )
    return True


@functools.lru_cache(maxsize=256)
def meetings(masks: tuple[Mask, ...], n: int, part: int, contiguous: bool) -> np.ndarray:
    """bool ``[hops, n]``: whether any query of device i may see a key that it meets in a hop; `hops` is as many as it
    takes until nothing is left to see, at least 1."""

    def any_seen(i: int, h: int) -> bool:
        j = (i - h) % n
        ends = (i * part, (i + 1) * part - 1, j * part, (j + 1) * part - 1)
        return any(m.tile(*ends, contiguous) != Tile.EMPTY for m in masks)

    table = np.array([[any_seen(i, h) for i in range(n)] for h in range(n)])
    return table[: max(np.flatnonzero(table.any(1)), default=0) + 1]


def attend(
    ctx: Context, v_BSKd: jax.Array, branches: tuple[AnyBranch, ...], local: Local
) -> tuple[jax.Array, jax.Array]:
    """Contract of `lm.attention.attend`, for calls that are `wanted`; `local` attends to the keys of one part."""
    found = current()
    assert found is not None
    layout, mesh = found
    axes = tuple(a for a in layout.axes_of("length") if mesh.shape[a] > 1)
    plain = [b for b in branches if isinstance(b, Branch)]
    n = layout.parts("length", dict(mesh.shape))
    contiguous = ctx.queries.contiguous and ctx.keys.contiguous
    seen = meetings(tuple(b.mask for b in plain), n, ctx.q_BTHd.shape[1] // n, contiguous)
    ring = _Ring(ctx, plain, local, axes, n, seen)
    out, lse = _attend(ring, mesh, {*axes, *layout.axes_of("layers")})(  # stages are mapped over
        ctx.q_BTHd,
        ctx.k_BSKd,
        v_BSKd,
        _Rows(ctx.queries, tuple(b.q_positions if isinstance(b.q_positions, jax.Array) else None for b in plain)),
        _Rows(ctx.keys, tuple(b.k_positions if isinstance(b.k_positions, jax.Array) else None for b in plain)),
        jnp.asarray(ctx.length, jnp.float32),
    )
    return out.astype(v_BSKd.dtype), lse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is known of one side's tokens, and where each branch puts them (None = the branch says)."""

    tokens: Tokens
    places: tuple[jax.Array | None, ...]


def _attend(ring: _Ring, mesh: jax.sharding.Mesh, manual: set[str]) -> Any:
    cut, whole = PartitionSpec(None, ring.axes), PartitionSpec()

    def mapped(fn: Any, n_in: int, out: Any) -> Any:
        """`fn` on every part of the first arguments and the whole of the last. All axes but those of the length
        (and of stages) are left to the compiler: rows and heads stay as they are cut."""
        specs = (*(cut,) * (n_in - 1), whole)
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, axis_names=manual, check_vma=False)

    @jax.custom_vjp
    def attend(q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, length: Any) -> Any:
        return mapped(ring.forward, 6, (cut, cut))(q, k, v, rows, cols, length)

    def forward(*args: Any) -> Any:
        out, lse = attend(*args)
        return (out, lse), (args, out, lse)

    def backward(saved: Any, cotangents: Any) -> Any:
        (*args, length), out, lse = saved
        grads = mapped(ring.backward, 10, (cut, cut, cut))(*args, out, lse, *cotangents, length)
        return *grads, *jax.tree.map(_no_gradient, (args[3], args[4], length))

    attend.defvjp(forward, backward)
    return attend


def _no_gradient(x: jax.Array) -> Any:
    """Indices and segments have none; positions are data."""
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The program of one device. `seen` is the table of `meetings`."""

    ctx: Context
    branches: Sequence[Branch]
    local: Local
    axes: tuple[str, ...]
    n: int
    seen: np.ndarray

    def meet(self, q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, length: Any, apart: bool) -> Any:
        """The queries of this device and the keys of one part: output ``[B, T / n, H, d]``, log-sum-exp."""
        q_tokens, k_tokens = (dataclasses.replace(r.tokens, contiguous=False, leading=0) for r in (rows, cols))
        old = self.ctx
        ctx = Context(q, k, q_tokens, k_tokens, old.positions, length, old.scale, old.rotated, v, apart=apart)
        branches = tuple(
            dataclasses.replace(
                b,
                q_positions=b.q_positions if at_q is None else at_q,
                k_positions=b.k_positions if at_k is None else at_k,
            )
            for b, at_q, at_k in zip(self.branches, rows.places, cols.places, strict=True)
        )
        return self.local(ctx, v, branches)

    def send(self, x: Any, by: int = 1) -> Any:
        pairs = [(i, (i + by) % self.n) for i in range(self.n)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, pairs), x)

    def forward(self, q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, length: Any) -> Any:
        out, lse = self.meet(q, k, v, rows, cols, length, apart=False)
        out = out.astype(jnp.float32)
        if len(self.seen) == 1:
            return out, lse
        me = jax.lax.axis_index(self.axes)

        def hop(carry: Any, seen: jax.Array) -> tuple[Any, None]:
            out, lse, here = carry
            after = self.send(here)  # on its way while this part is computed

            def meet(here: Any) -> Any:
                k, v, cols = here
                o, own = self.meet(q, k, v, rows, cols, length, apart=True)
                return merge([out, o.astype(jnp.float32)], [lse, own])

            return (*jax.lax.cond(seen[me], meet, lambda _: (out, lse), here), after), None

        (out, lse, _), _ = jax.lax.scan(hop, (out, lse, self.send((k, v, cols))), jnp.asarray(self.seen[1:]))
        return out, lse

    def backward(
        self, q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, out: Any, lse: Any, d_out: Any, d_lse: Any, length: Any
    ) -> Any:
        """Gradients of queries, keys and values. A hop's share of the result is ``w = exp(lse_hop - lse)``; its output
        gets ``w dO`` and its log-sum-exp ``w (dO . (O_hop - O) + dLSE)``, and the backend's own gradient does the rest.
        """

        def pull(k: Any, v: Any, cols: _Rows, apart: bool) -> Any:
            (o, own), back = jax.vjp(lambda q, k, v: self.meet(q, k, v, rows, cols, length, apart), q, k, v)
            w = jnp.where(own <= NEG / 2, 0.0, jnp.exp(own - lse))
            d_l = w * ((d_out * (o.astype(jnp.float32) - out)).sum(-1) + d_lse)
            return tuple(g.astype(jnp.float32) for g in back(((w[..., None] * d_out).astype(o.dtype), d_l)))

        dq, dk, dv = pull(k, v, cols, apart=False)
        hops = len(self.seen)
        if hops > 1:
            me = jax.lax.axis_index(self.axes)

            def hop(carry: Any, seen: jax.Array) -> tuple[Any, None]:
                dq, grads, here = carry
                after = self.send(here)

                def meet(here: Any) -> Any:
                    k, v, cols = here
                    return jax.tree.map(jnp.add, (dq, *grads), pull(k, v, cols, apart=True))

                dq, *own = jax.lax.cond(seen[me], meet, lambda _: (dq, *grads), here)
                return (dq, self.send(tuple(own)), after), None

            start = (dq, self.send((dk, dv)), self.send((k, v, cols)))
            (dq, (dk, dv), _), _ = jax.lax.scan(hop, start, jnp.asarray(self.seen[1:]))
            if hops < self.n:  # all the way round they are home
                dk, dv = self.send((dk, dv), -hops)
        return tuple(g.astype(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True))
