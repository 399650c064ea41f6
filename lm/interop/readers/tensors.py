"""From named tensors of a file to the parameter tree, by the table of a family; shapes are checked."""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.interop.adapters.change import Change
from lm.interop.families.table import Table, flip, same
from lm.interop.readers.memory import Memory
from lm.interop.slots import Index, Slot, flat_shape, slots
from lm.model import params as params_lib
from lm.nested import nested
from lm.sharding.layout import Where

# Constants some files carry along; tied heads are dropped by the readers.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|attention\.bias|attention\.masked_bias)$")

PIECE = 1 << 20  # numbers that are converted at a time
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # all ones in infinities and NaN


class Source(abc.ABC):
    """The tensors of one checkpoint, by the names of its family's table."""

    file: Path  # for messages

    @abc.abstractmethod
    def names(self) -> set[str]:
        """All there are."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One of them, in the type it is stored in."""

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]] | None:
        """The same row by row of its first axis, as (first row, some rows); None where it is read whole."""
        return None


def fill(
    cfg: ModelConfig, table: Table, source: Source, change: Change | None = None, where: Where | None = None
) -> dict[str, Any]:
    """The parameter tree of `cfg`, in ``cfg.param_dtype``, each tensor read straight to its place.

    `change` is done to the tensors meanwhile, in float32; `where` says on which devices a parameter lives. Raises
    `UserError` for a missing tensor, any other shape than the file's library writes, numbers that are not finite or too
    large for ``cfg.param_dtype``, or a tensor the model has no place for.
    """
    tensors = _Tensors(cfg, table, source, change)
    if cfg.n_layers > len(tensors.names):  # said before anything of that size is built
        raise UserError(
            f"{source.file}: {len(tensors.names)} tensors found, fewer than the {cfg.n_layers} layers of the model"
        )
    leaves = params_lib.names(params_lib.abstract(cfg))
    out: dict[str, Any] = {}
    for ours, places in slots(cfg, table).items():
        memory = Memory(leaves[ours], None if where is None else where(ours))
        for slot, at in places:
            tensors.put(memory, slot, at, ours)
        out[ours] = memory.array()
    foreign = tensors.foreign()
    if foreign:
        raise UserError(f"{source.file}: {len(foreign)} tensors have no place in the model, first {foreign[0]!r}")
    return nested(out)


class _Tensors:
    """The tensors of one checkpoint, and which of them have been read."""

    def __init__(self, cfg: ModelConfig, table: Table, source: Source, change: Change | None) -> None:
        self.cfg, self.table, self.source, self.change = cfg, table, source, change
        self.names, self.file = source.names(), source.file
        self.used: set[str] = set()
        experts = {slot[0] for places in slots(cfg).values() for slot, _ in places if slot[2] is not None}
        self.together = {short for short in experts if "{e}" not in table[short][0]}  # all experts in one tensor

    def put(self, memory: Memory, slot: Slot, at: Index, ours: str) -> None:
        """The tensor of `slot` to its place `at` in the parameter `ours`."""
        short, i, e = slot
        stored, turn = self.table[short]
        name, shape = stored.format(i=i, e=e), memory.shape[len(at) :]
        if name not in self.names:
            raise UserError(f"{self.file}: tensor {name!r} is missing (needed for {ours})")
        self.used.add(name)
        changes = self._changes(slot, shape)
        cut = self.source.pieces(name) if turn in (same, flip) and len(shape) == 2 and not changes else None
        if cut is not None:
            self._cut(memory, name, at, ours, cut, turn is flip)
            return
        tensor = self.source.read(name)
        try:
            value = np.asarray(turn(tensor, self.cfg))
        except (ValueError, IndexError):
            raise self._misfit(name, tensor.shape, ours, shape) from None
        if not fits(value.shape, short, shape, plain=turn in (same, flip)):
            raise self._misfit(name, tensor.shape, ours, shape)
        value = value.reshape(shape)
        if changes:
            value = value.astype(np.float32)
            for single, within in changes:
                assert self.change is not None
                value[within] = self.change.apply(single, value[within])
        rows = max(1, PIECE // max(1, value[:1].size))
        for first in range(0, len(value), rows):
            memory.put(at, self._cast(name, value[first : first + rows], memory), (first, *(0,) * (value.ndim - 1)))

    def _cast(self, name: str, value: np.ndarray, memory: Memory) -> np.ndarray:
        """In the parameter's type. Raises `UserError` for numbers that are none there."""
        with np.errstate(over="ignore"):
            made = value.astype(memory.dtype, copy=False)
        if not finite(made):
            what = f"numbers too large for {memory.dtype}" if finite(value) else "numbers that are not finite"
            raise UserError(f"{self.file}: tensor {name!r} has {what}; valid: finite weights")
        return made

    def _changes(self, slot: Slot, shape: tuple[int, ...]) -> list[tuple[Slot, Index]]:
        """What changes of a tensor of that shape: the whole, or some of the experts in it, and where they are."""
        if self.change is None:
            return []
        short, i, _ = slot
        whole: list[tuple[Slot, Index]] = [(slot, ())]
        singles = [((short, i, e), (e,)) for e in range(shape[0])] if short in self.together else whole
        return [(single, within) for single, within in singles if self.change.touches(single)]

    def _cut(
        self, memory: Memory, name: str, at: Index, ours: str, cut: Iterator[tuple[int, np.ndarray]], flipped: bool
    ) -> None:
        """A matrix that is read by rows, and turned if `flipped`."""
        shape, rows = memory.shape[len(at) :], 0
        wanted = shape[::-1] if flipped else shape
        for first, some in cut:
            rows = first + len(some)
            if some.shape[1:] != wanted[1:] or rows > wanted[0]:
                raise self._misfit(name, self.source.read(name).shape, ours, shape)
            some = self._cast(name, some, memory)  # faster than on the way to other strides
            memory.put(at, some.T if flipped else some, (0, first) if flipped else (first, 0))
        if rows != wanted[0]:
            raise self._misfit(name, (rows, *wanted[1:]), ours, shape)

    def _misfit(self, name: str, found: tuple[int, ...], ours: str, shape: tuple[int, ...]) -> UserError:
        return UserError(
            f"{self.file}: tensor {name!r} has shape {tuple(found)}, which does not give {ours} of shape {shape}"
        )

    def foreign(self) -> list[str]:
        """What has not been read and is no constant of the file's library, sorted."""
        return sorted(name for name in self.names - self.used if not BUFFERS.search(name))


def fits(found: tuple[int, ...], short: str, shape: tuple[int, ...], plain: bool) -> bool:
    """Whether what a file's tensor was turned into is a tensor of `shape`, named `short` within its layer: with heads
    in one axis or, where a turn made them (not `plain`), in their own."""
    return found == flat_shape(short, shape) or (not plain and found == shape)


def finite(x: np.ndarray) -> bool:
    """Whether all numbers are; by their exponents, which is quick for every type."""
    mask = _EXPONENT.get(x.dtype.name)
    if mask is None:
        return bool(np.isfinite(x).all())
    bits = x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))
    return int((bits & bits.dtype.type(mask)).max(initial=0)) != mask


def check(cfg: ModelConfig, params: Mapping[str, object], source: str) -> None:
    """Raises `UserError` when `params` are not the parameters of `cfg`, naming the first that differs."""
    ours = {k: tuple(v.shape) for k, v in params_lib.names(params).items()}
    wanted = {k: tuple(v.shape) for k, v in params_lib.names(params_lib.abstract(cfg)).items()}
    for name in sorted({*ours, *wanted}):
        if ours.get(name) != wanted.get(name):
            raise UserError(
                f"overrides of {source}: the model would have {name} of shape {wanted.get(name)}, the checkpoint's is "
                f"{ours.get(name)}; valid: overrides that leave the parameters as they are"
            )


def content_hash(paths: Iterable[Path]) -> str:
    """sha256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
