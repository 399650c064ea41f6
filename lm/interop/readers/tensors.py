"""From named tensors of a file to the parameter tree, by the table of a family; shapes are checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.interop.families.table import Table, Turn
from lm.model import params as params_lib

# Constants some files carry along; tied heads are dropped by the readers.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|attention\.bias|attention\.masked_bias)$")


def fill(
    cfg: ModelConfig, table: Table, get: Callable[[str], np.ndarray], names: Iterable[str], file: Path
) -> dict[str, Any]:
    """The parameter tree of `cfg`. `get` reads one tensor; `names` are all tensors of the file.

    Raises `UserError` for a missing tensor, a wrong shape, or a tensor the model has no place for.
    """
    tensors = _Tensors(cfg, get, set(names), file)
    if cfg.n_layers > len(tensors.names):  # said before anything of that size is built
        raise UserError(
            f"{file}: {len(tensors.names)} tensors found, fewer than the {cfg.n_layers} layers of the model"
        )
    out: dict[str, Any] = {}
    for ours, leaf in params_lib.names(params_lib.abstract(cfg)).items():
        block, _, rest = ours.partition("/")
        if block == "blocks":  # all layers in one array
            name, turn = table[rest]
            value = tensors.stack([name.replace("{i}", str(i)) for i in range(cfg.n_layers)], turn, leaf, ours)
        elif block.startswith("blocks_"):  # layers of different shapes: one tree each
            name, turn = table[rest]
            value = tensors.read(name.replace("{i}", block.removeprefix("blocks_")), turn, leaf, ours)
        else:
            value = tensors.read(*table[ours], leaf, ours)
        node = out
        *parents, last = ours.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)
    foreign = tensors.foreign()
    if foreign:
        raise UserError(f"{file}: {len(foreign)} tensors have no place in the model, first {foreign[0]!r}")
    return out


class _Tensors:
    """The tensors of one file by name, and which of them have been read."""

    def __init__(self, cfg: ModelConfig, get: Callable[[str], np.ndarray], names: set[str], file: Path) -> None:
        self.cfg, self.get, self.names, self.file = cfg, get, names, file
        self.used: set[str] = set()

    def read(self, name: str, turn: Turn, leaf: jax.ShapeDtypeStruct, ours: str) -> np.ndarray:
        """The tensor `name` as the parameter `ours`, whose shape and type `leaf` has."""
        if "{e}" in name:  # one tensor per expert in the file, one stack here
            return np.stack(
                [self.read(name.replace("{e}", str(e)), turn, _slice(leaf), ours) for e in range(leaf.shape[0])]
            )
        if name not in self.names:
            raise UserError(f"{self.file}: tensor {name!r} is missing (needed for {ours})")
        self.used.add(name)
        tensor = self.get(name)
        try:
            return np.asarray(turn(tensor, self.cfg), leaf.dtype).reshape(leaf.shape)
        except (ValueError, IndexError):
            raise UserError(
                f"{self.file}: tensor {name!r} has shape {tuple(tensor.shape)}, which does not give {ours} of shape "
                f"{leaf.shape}"
            ) from None

    def stack(self, names: list[str], turn: Turn, leaf: jax.ShapeDtypeStruct, ours: str) -> np.ndarray:
        """The tensors `names` along a new first axis."""
        first = self.read(names[0], turn, _slice(leaf), ours)  # its shape is right: room for all can be made
        value = np.empty(leaf.shape, leaf.dtype)
        value[0] = first
        for i, name in enumerate(names[1:], 1):
            value[i] = self.read(name, turn, _slice(leaf), ours)
        return value

    def foreign(self) -> list[str]:
        """What has not been read and is no constant of the file's library, sorted."""
        return sorted(name for name in self.names - self.used if not BUFFERS.search(name))


def _slice(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


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
