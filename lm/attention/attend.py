"""`attend`: one softmax over a union of branches, on the backend that is asked for or that suits."""

from __future__ import annotations

import jax

from lm.attention.backends import blocked, dense, pallas, ring
from lm.attention.branches import AnyBranch, BlockBranch, Context
from lm.attention.tiles import block
from lm.errors import UserError, unknown

BACKENDS = ("auto", "dense", "blocked", "pallas")


def attend(
    ctx: Context,
    branches: tuple[AnyBranch, ...],
    *,
    softcap: float | None = None,
    backend: str = "auto",
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over the union of `branches`: output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``.

    ``auto`` takes the kernels (`lm.attention.backends.pallas`), or where they cannot serve or the program is not for
    TPUs `blocked`, where tiles can pay (more queries than a block and as many keys, or several queries that list
    blocks), else `dense`. By name, a backend works or says why it cannot. Tile sizes that are None
    are chosen by `lm.attention.tiles.block`, those of the kernels by `kernels_pallas.common.BLOCKS`. Where the layout
    cuts the length, parts of the keys go round the devices (`lm.attention.backends.ring`), each meeting on the backend.

    Raises `UserError` for an unknown backend, and for branches that no ring can do under ``train.mesh.attention=ring``.
    """
    if backend not in BACKENDS:
        raise unknown("model.mixer.backend", backend, BACKENDS)

    def local(ctx: Context, branches: tuple[AnyBranch, ...]) -> tuple[jax.Array, jax.Array]:
        return _here(ctx, branches, softcap, backend, block_q, block_k)

    if ring.wanted(ctx, branches):
        return ring.attend(ctx, branches, local)
    return local(ctx, branches)


def _here(
    ctx: Context,
    branches: tuple[AnyBranch, ...],
    softcap: float | None,
    backend: str,
    block_q: int | None,
    block_k: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`attend` with all keys at hand."""
    B, T, H, _ = ctx.q_BTHd.shape
    S = ctx.k_BSKd.shape[1]
    if backend == "pallas":
        return pallas.attend(ctx, branches, softcap, block_q, block_k)
    if ctx.queries.ancestors_BTT is not None:  # a tree is small, and no tile of it can be skipped by index
        if backend == "blocked":
            raise UserError("model.mixer.backend: 'blocked' serves texts, these tokens are a tree; valid: auto, dense")
        if not ctx.sources[0].new:
            raise UserError("model.cache: it does not keep new tokens apart, as a tree of them needs; valid: full")
        return dense.attend(ctx, branches, softcap)
    given_q, given_k = block_q, block_k
    chosen = block(B * H, jax.default_backend())
    block_q, block_k = block_q or chosen[0], block_k or chosen[1]
    listed = T > 1 and all(isinstance(branch, BlockBranch) for branch in branches)
    tiled = listed or (T == S and T > block_q)
    if backend == "auto" and tiled and pallas.platform() == "tpu" and pallas.refusal(ctx, branches) is None:
        return pallas.attend(ctx, branches, softcap, given_q, given_k)
    if backend == "blocked" or (backend == "auto" and tiled):
        return blocked.attend(ctx, branches, softcap, block_q, block_k)
    return dense.attend(ctx, branches, softcap)
