"""From named tensors of a file to the parameter tree: one table per family, shapes checked against the model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import params as params_lib

# our name (without "blocks/") -> (name in the file, `{i}` = layer, `{e}` = expert; how to turn it)
Table = dict[str, tuple[str, Callable[..., np.ndarray]]]


def same(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return x


def flip(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """``[out, in]`` -> ``[in, out]``."""
    return x.T


def fill(cfg: ModelConfig, table: Table, get: Callable[[str], np.ndarray], names: Iterable[str], file: Path) -> Any:
    """The parameter tree of `cfg`. `get` reads one tensor; `names` are all tensors of the file.

    Raises `UserError` for a missing tensor, a wrong shape, or a tensor the model has no place for.
    """
    available, used = set(names), set()
    if cfg.n_layers > len(available):  # said before anything of that size is built
        raise UserError(f"{file}: {len(available)} tensors found, fewer than the {cfg.n_layers} layers of the model")

    def read(name: str, turn: Any, shape: tuple[int, ...], dtype: Any, ours: str) -> np.ndarray:
        if "{e}" in name:  # one tensor per expert there, one stack here
            every = [read(name.replace("{e}", str(e)), turn, shape[1:], dtype, ours) for e in range(shape[0])]
            return np.stack(every)
        if name not in available:
            raise UserError(f"{file}: tensor {name!r} is missing (needed for {ours})")
        used.add(name)
        found = get(name)
        try:
            return np.asarray(turn(found, cfg), dtype).reshape(shape)
        except (ValueError, IndexError):
            raise UserError(
                f"{file}: tensor {name!r} has shape {tuple(found.shape)}, which does not give {ours} of shape {shape}"
            ) from None

    out: dict[str, Any] = {}
    for ours, leaf in params_lib.names(params_lib.abstract(cfg)).items():
        block, _, own = ours.partition("/")
        alone = block.removeprefix("blocks_") if block.startswith("blocks_") else None
        name, turn = table[own if block == "blocks" or alone is not None else ours]
        if alone is not None:  # layers of different shapes: one tree each
            value = read(name.replace("{i}", alone), turn, leaf.shape, leaf.dtype, ours)
        elif block == "blocks":
            first = read(name.replace("{i}", "0"), turn, leaf.shape[1:], leaf.dtype, ours)  # its shape is right: room
            value = np.empty(leaf.shape, leaf.dtype)
            value[0] = first
            for i in range(1, cfg.n_layers):
                value[i] = read(name.replace("{i}", str(i)), turn, leaf.shape[1:], leaf.dtype, ours)
        else:
            value = read(name, turn, leaf.shape, leaf.dtype, ours)
        node = out
        *parents, last = ours.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)
    foreign = sorted(n for n in available - used if not BUFFERS.search(n))
    if foreign:
        raise UserError(f"{file}: {len(foreign)} tensors have no place in the model, first {foreign[0]!r}")
    return out


def check(cfg: ModelConfig, params: Any, source: str) -> None:
    """Raises `UserError` when `params` are not the parameters of `cfg`, naming the first that differs."""
    found = {k: tuple(v.shape) for k, v in params_lib.names(params).items()}
    wanted = {k: tuple(v.shape) for k, v in params_lib.names(params_lib.abstract(cfg)).items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"overrides of {source}: the model would have {name} of shape {wanted.get(name)}, the checkpoint's is "
                f"{found.get(name)}; valid: overrides that leave the parameters as they are"
            )


# Constants some files carry along; tied heads are dropped by the readers.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|attention\.bias|attention\.masked_bias)$")


def content_hash(paths: Iterable[Path]) -> str:
    """sha256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
