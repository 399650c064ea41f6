"""Ring attention (arXiv 2310.01889): where a layout cuts the length, keys and values go round, queries stay.

Device i of n holds part i of the tokens. In hop h it meets the keys of part ``i - h``: it attends to them with the
backend that attends to all keys elsewhere, and joins the result to what it has by log-sum-exp (`branches.merge`). What
a pair of tokens is worth follows from the tokens' own indices, positions and segments, which travel with the keys, so
masks, windows, sinks, biases, soft caps and a branch's positions mean what they mean on one device. Keys travel
unrotated: every branch rotates them where they are.

Hops in which no device sees anything are not made (a window of w tokens needs ``1 + ceil((w - 1) / part)`` hops), and
a device that sees nothing of a part does not compute. The gradient goes round a second time and recomputes each hop
from the final log-sum-exp, with the gradients of keys and values travelling along, so a device never holds more than
two parts of either.

Under a causal mask the last device has work in all hops and the first in one, and all wait for the last. With
``train.mesh.attention=zigzag`` the text is cut into 2 n pieces and device i takes pieces i and ``2 n - 1 - i`` (as
Llama 3 does, arXiv 2407.21783, section 3.3.2; striped attention, arXiv 2311.09431, is the same idea token by token): of
the four pairs of a hop every device sees two. Queries, keys and values change places before, and results after, by two
permutes of half a part each; nothing outside the attention knows of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.attention.branches import NEG, AnyBranch, BlockBranch, Branch, Context, Keys, Tokens, merge
from lm.attention.masks import Mask, Tile
from lm.errors import UserError
from lm.sharding.layout import current

Local = Callable[[Context, tuple[AnyBranch, ...]], tuple[jax.Array, jax.Array]]


def refusal(branches: Sequence[AnyBranch]) -> str | None:
    """Why these branches cannot be taken part by part; None if they can."""
    for branch in branches:
        if isinstance(branch, BlockBranch):
            return "its keys are listed by block, anywhere in the text"
        if branch.gather_BHTn is not None:
            return "its keys are listed one by one, anywhere in the text"
        if branch.rows is not None:
            return "a branch is for the last queries only"
        if branch.source:
            return "its keys come from more than one source"
    return None


def wanted(ctx: Context, branches: Sequence[AnyBranch]) -> bool:
    """Whether the current layout makes a ring of this call.

    Raises `UserError` where it does and the branches cannot.
    """
    found = current()
    if found is None or found[0].attention == "gather":
        return False
    n, T = found[0].parts("length", dict(found[1].shape)), ctx.q_BTHd.shape[1]
    if n == 1 or T % n or T != ctx.k_BSKd.shape[1]:  # a single token only says what shapes are
        return False
    why = refusal(branches)
    if why is not None:
        raise UserError(
            f"train.mesh.attention: {found[0].attention} is impossible for the model's pattern ({why}); valid: gather, "
            "which brings all keys to every device"
        )
    return True


@functools.lru_cache(maxsize=256)
def meetings(masks: tuple[Mask, ...], n: int, part: int, contiguous: bool, pieces: int = 1) -> np.ndarray:
    """bool ``[hops, n, pieces, pieces]``: whether any query of a device's piece may see a key of a piece that the
    device meets in a hop; `hops` is as many as it takes until nothing is left to see, at least 1. `pieces`: 1, a part
    is one; 2, device i has pieces i and ``2 n - 1 - i`` of ``2 n``."""
    size = part // pieces

    def at(i: int, a: int) -> tuple[int, int]:
        c = 2 * n - 1 - i if a else i
        return c * size, (c + 1) * size - 1

    def any_seen(i: int, h: int, a: int, b: int) -> bool:
        ends = (*at(i, a), *at((i - h) % n, b))
        return any(m.tile(*ends, contiguous) != Tile.EMPTY for m in masks)

    both = range(pieces)
    table = np.array([[[[any_seen(i, h, a, b) for b in both] for a in both] for i in range(n)] for h in range(n)])
    return table[: max(np.flatnonzero(table.any((1, 2, 3))), default=0) + 1]


def attend(ctx: Context, branches: tuple[AnyBranch, ...], local: Local) -> tuple[jax.Array, jax.Array]:
    """`lm.attention.attend.attend` for calls that are `wanted`; `local` attends to the keys of one part."""
    found = current()
    assert found is not None
    layout, mesh = found
    axes = tuple(a for a in layout.axes_of("length") if mesh.shape[a] > 1)
    plain = [b for b in branches if isinstance(b, Branch)]
    n = layout.parts("length", dict(mesh.shape))
    contiguous = ctx.queries.contiguous and ctx.keys.contiguous
    part = ctx.q_BTHd.shape[1] // n
    pieces = 2 if layout.attention == "zigzag" and part % 2 == 0 else 1
    seen = meetings(tuple(b.mask for b in plain), n, part, contiguous, pieces)
    ring = _Ring(ctx, plain, local, axes, n, seen)
    out, lse = _attend(ring, mesh, {*axes, *layout.axes_of("layers")})(  # stages are mapped over
        ctx.q_BTHd,
        ctx.k_BSKd,
        ctx.v_BSKd,
        _Rows(ctx.queries, tuple(b.q_positions if isinstance(b.q_positions, jax.Array) else None for b in plain)),
        _Rows(ctx.keys, tuple(b.k_positions if isinstance(b.k_positions, jax.Array) else None for b in plain)),
        jnp.asarray(ctx.length, jnp.float32),
    )
    return out.astype(ctx.v_BSKd.dtype), lse


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
        keys = Keys(k, v, k_tokens, old.rotated)
        ctx = Context(q, q_tokens, (keys,), old.positions, length, old.scale, apart=apart)
        branches = tuple(
            dataclasses.replace(
                b,
                q_positions=b.q_positions if at_q is None else at_q,
                k_positions=b.k_positions if at_k is None else at_k,
            )
            for b, at_q, at_k in zip(self.branches, rows.places, cols.places, strict=True)
        )
        return self.local(ctx, branches)

    @property
    def pieces(self) -> int:
        return int(self.seen.shape[-1])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pieces of queries and of keys, those of the same number first."""
        both = range(self.pieces)
        return sorted(itertools.product(both, both), key=lambda pair: pair[0] != pair[1])

    def send(self, x: Any, by: int = 1) -> Any:
        return self.permute(x, [(i, (i + by) % self.n) for i in range(self.n)])

    def permute(self, x: Any, pairs: list[tuple[int, int]]) -> Any:
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, pairs), x)

    def enter(self, x: Any) -> Any:
        """Pieces of a device's part (a tree of ``[B, T / n, …]``), as `pieces` of them lie in the ring."""
        if self.pieces == 1:
            return [x]
        even, odd = (self.permute(half, self.places(k)) for k, half in enumerate(_halves(x)))
        return self.swapped(even, odd)

    def leave(self, pieces: Sequence[Any]) -> Any:
        """A device's part again."""
        if self.pieces == 1:
            return pieces[0]
        halves = enumerate(self.swapped(*pieces))
        even, odd = (self.permute(half, [(b, a) for a, b in self.places(k)]) for k, half in halves)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), even, odd)

    def places(self, k: int) -> list[tuple[int, int]]:
        """Where the k-th halves of parts go: device i has pieces 2 i and 2 i + 1 of the text."""
        return [(i, min(2 * i + k, 2 * self.n - 1 - 2 * i - k)) for i in range(self.n)]

    def swapped(self, a: Any, b: Any) -> list[Any]:
        """Even device numbers have an even early piece and an odd late one, odd ones the reverse."""
        odd = jax.lax.axis_index(self.axes) % 2 == 1
        pick = functools.partial(jax.tree.map, lambda x, y: jnp.where(odd, y, x))
        return [pick(a, b), pick(b, a)]

    def forward(self, q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, length: Any) -> Any:
        asks, here = self.enter((q, rows)), self.enter((k, v, cols))
        me = jax.lax.axis_index(self.axes)

        def meet(old: Any, ask: Any, key: Any, apart: bool) -> Any:
            (q, rows), (k, v, cols) = ask, key
            o, own = self.meet(q, k, v, rows, cols, length, apart)
            o = o.astype(jnp.float32)
            return (o, own) if old is None else merge([old[0], o], [old[1], own])

        def hop(found: Any, here: Any, seen: Any, apart: bool) -> Any:
            """Every piece of queries with every piece of keys that it sees; the first meeting has nothing to join."""
            found = list(found)
            for a, b in self.pairs:
                join = functools.partial(meet, ask=asks[a], key=here[b], apart=apart or a != b)
                found[a] = join(None) if found[a] is None else jax.lax.cond(seen[a, b], join, _same, found[a])
            return tuple(found)

        found = hop((None,) * self.pieces, here, jnp.asarray(self.seen[0])[me], apart=False)
        if len(self.seen) > 1:

            def step(carry: Any, seen: jax.Array) -> tuple[Any, None]:
                found, here = carry
                after = self.send(here)  # on its way while this part is computed
                return (hop(found, here, seen[me], apart=True), after), None

            (found, _), _ = jax.lax.scan(step, (found, self.send(here)), jnp.asarray(self.seen[1:]))
        return self.leave(found)

    def backward(
        self, q: Any, k: Any, v: Any, rows: _Rows, cols: _Rows, out: Any, lse: Any, d_out: Any, d_lse: Any, length: Any
    ) -> Any:
        """Gradients of queries, keys and values. A hop's share of the result is ``w = exp(lse_hop - lse)``; its output
        gets ``w dO`` and its log-sum-exp ``w (dO . (O_hop - O) + dLSE)``, and the backend's own gradient does the rest.
        """
        asks, here = self.enter((q, rows, out, lse, d_out, d_lse)), self.enter((k, v, cols))
        me = jax.lax.axis_index(self.axes)

        def pull(ask: Any, key: Any, apart: bool) -> Any:
            (q, rows, out, lse, d_out, d_lse), (k, v, cols) = ask, key
            (o, own), back = jax.vjp(lambda q, k, v: self.meet(q, k, v, rows, cols, length, apart), q, k, v)
            w = jnp.where(own <= NEG / 2, 0.0, jnp.exp(own - lse))
            d_l = w * ((d_out * (o.astype(jnp.float32) - out)).sum(-1) + d_lse)
            return tuple(g.astype(jnp.float32) for g in back(((w[..., None] * d_out).astype(o.dtype), d_l)))

        def add(old: Any, ask: Any, key: Any, apart: bool) -> Any:
            return jax.tree.map(jnp.add, old, pull(ask, key, apart))

        def hop(dqs: Any, grads: Any, here: Any, seen: Any, apart: bool) -> Any:
            dqs, grads = list(dqs), list(grads)
            for a, b in self.pairs:
                join = functools.partial(add, ask=asks[a], key=here[b], apart=apart or a != b)
                old = (dqs[a], *grads[b])
                dqs[a], *own = join(old) if a == b and not apart else jax.lax.cond(seen[a, b], join, _same, old)
                grads[b] = tuple(own)
            return tuple(dqs), tuple(grads)

        def zeros(x: Any) -> jax.Array:
            return jnp.zeros(x.shape, jnp.float32)

        start = tuple(zeros(ask[0]) for ask in asks), tuple((zeros(key[0]), zeros(key[1])) for key in here)
        dqs, grads = hop(*start, here, jnp.asarray(self.seen[0])[me], apart=False)
        hops = len(self.seen)
        if hops > 1:

            def step(carry: Any, seen: jax.Array) -> tuple[Any, None]:
                dqs, grads, here = carry
                after = self.send(here)
                dqs, grads = hop(dqs, grads, here, seen[me], apart=True)
                return (dqs, self.send(grads), after), None

            carry = (dqs, self.send(grads), self.send(here))
            (dqs, grads, _), _ = jax.lax.scan(step, carry, jnp.asarray(self.seen[1:]))
            if hops < self.n:  # all the way round they are home
                grads = self.send(grads, -hops)
        dk, dv = self.leave(grads)
        return tuple(g.astype(x.dtype) for g, x in zip((self.leave(dqs), dk, dv), (q, k, v), strict=True))


def _same(x: Any) -> Any:
    return x


def _halves(x: Any) -> tuple[Any, Any]:
    """Both halves of a tree of ``[B, T, …]``."""
    first = jax.tree.map(lambda a: a[:, : a.shape[1] // 2], x)
    return first, jax.tree.map(lambda a: a[:, a.shape[1] // 2 :], x)
