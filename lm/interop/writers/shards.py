"""Safetensors files of one model, each tensor made when it is written: the library's own writer wants all at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, shown
from lm.files import write_json

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LARGEST = "5GB"
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
INDEX, PATTERN = "model.safetensors.index.json", "model{suffix}.safetensors"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name and shape, and the numbers when they are asked for."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def largest(text: str) -> int:
    """Bytes of ``5GB``; `UserError` for a size that is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError(
            f"--max-shard-size: found {shown(text)}; valid: a number with KB, MB, GB or TB, as in {LARGEST}"
        )
    return size


def write(folder: Path, entries: Sequence[Entry], dtype: str, max_shard_size: str = LARGEST) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_size` with their index, all tensors as `dtype`."""
    from huggingface_hub import split_state_dict_into_shards_factory

    kind = jnp.dtype(dtype)
    by_name = {e.name: e for e in sorted(entries, key=lambda e: _natural(e.name))}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda e: e.size * kind.itemsize,
        filename_pattern=PATTERN,
        max_shard_size=largest(max_shard_size),
    )
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, [by_name[name] for name in names], kind)
    if split.is_sharded:
        sizes = {"total_size": sum(e.size for e in entries) * kind.itemsize}
        write_json(folder / INDEX, {"metadata": sizes, "weight_map": split.tensor_to_filename}, indent=2)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _write(file: Path, entries: Sequence[Entry], kind: np.dtype) -> None:
    """One file: the length of the header, the header, then the tensors one behind the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size * kind.itemsize
        header[entry.name] = {"dtype": NAMES[kind.name], "shape": list(entry.shape), "data_offsets": [start, end]}
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    with file.open("wb") as out:
        out.write(len(said).to_bytes(8, "little") + said)
        for entry in entries:
            value = np.ascontiguousarray(entry.make().astype(kind, copy=False))
            assert value.shape == entry.shape, entry.name
            out.write(value.reshape(-1).view(np.uint8).data)
