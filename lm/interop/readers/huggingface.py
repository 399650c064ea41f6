"""Hugging Face directories: config.json, safetensors (whole or sharded), tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

import lm.interop.card as card
import lm.interop.readers.schema as schema
import lm.interop.readers.tensors as tensors
from lm import files
from lm.config import ModelConfig
from lm.data.record import TextRecord, from_folder
from lm.errors import UserError
from lm.interop.adapters.change import Change
from lm.interop.families import FAMILIES
from lm.interop.families.keys import unknown_family
from lm.interop.readers.base import Reader
from lm.interop.readers.stored import FLOATS, Stored, stored_in
from lm.sharding.layout import Where

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` when it is not there, does not parse, or is something else."""
    try:
        return files.read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face directory needs config.json") from None


class Directory(Reader):
    """A checkpoint directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf = read_json(path / "config.json")
        schema.check(self.hf, path / "config.json")
        quantised = self.hf.get("quantization_config")
        if quantised:
            how = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise UserError(
                f"{path / 'config.json'} quantization_config: weights quantised by {how or 'an unnamed method'!r} are "
                "not read; valid: the checkpoint as floating point numbers, or a GGUF file of it"
            )
        kind = self.hf.get("model_type")
        if kind not in FAMILIES:
            known = {name: family.defaults for name, family in FAMILIES.items()}
            raise unknown_family(self.hf, known, str(path / "config.json"))
        self.kind, self.family = kind, FAMILIES[kind]

    def model(self) -> dict[str, Any]:
        return self.family.read(self.hf)

    def _files(self) -> list[Path]:
        """The files of the weights: one whole, else the shards of an index, else all there are."""
        index = self.path / INDEX
        if (self.path / WHOLE).is_file():  # others beside it are adapters or another layout
            files = [self.path / WHOLE]
        elif index.is_file():
            files = [self.path / name for name in self._shards(index)]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*"))
            found = f"found only {pickled[0]}, a pickle" if pickled else "found none"
            raise UserError(
                f"{self.path}: no .safetensors file, {found}; valid: model.safetensors or shards with an index"
            )
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such file, though the index of {self.path} names it")
        return files

    def _shards(self, index: Path) -> list[str]:
        """The files that an index names, sorted."""
        listed = read_json(index)
        shards = listed.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(n, str) for n in shards.values()):
            raise UserError(f"{index}: 'weight_map' is missing, empty, or maps to something not a file name")
        names = sorted(set(shards.values()))
        for name in names:
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f"{index}: names {name!r}, which is outside of the folder; valid: files in it")
        return names

    def _tensors(self) -> dict[str, Stored]:
        """Every tensor by its full name, not yet read."""
        head, prefix = self.family.head, self.family.prefix
        out: dict[str, Stored] = {}
        for stored in (s for file in self._files() for s in stored_in(file)):
            name = stored.name
            out[name if name == head or name.startswith(prefix) else prefix + name] = stored
        return out

    def params(self, cfg: ModelConfig, change: Change | None = None, where: Where | None = None) -> dict[str, Any]:
        found = self._tensors()
        for stored in found.values():
            stored.check()
        if cfg.head.reads_embedding:
            self._tied(found)
        return tensors.fill(cfg, self.family.table, _Source(self.path, found), change, where)

    def model_type(self) -> str:
        return self.kind

    def _tied(self, found: dict[str, Stored]) -> None:
        """Of a model whose head is its embedding table, `found` keeps the table. Raises `UserError` for a head that
        is another matrix."""
        embed, head = self.family.table["embed"][0], found.pop(self.family.head, None)
        if head is None:
            return
        if embed not in found:  # saved under the other of its two names
            found[embed] = head
        elif not found[embed].equals(head):
            raise UserError(
                f"{self.path / 'config.json'} tie_word_embeddings: true, but the file has a tensor "
                f"{self.family.head!r} that differs from the embedding table; valid: false, to read with that head"
            )

    def dtype(self) -> str:
        kinds = [stored.kind() for stored in self._tensors().values()]
        common = max(set(kinds), key=kinds.count, default="F32")
        return FLOATS.get(common, "float32")

    def text(self) -> TextRecord:
        return from_folder(self.path, self.hf)

    def identity(self) -> str:
        return tensors.content_hash([self.path / "config.json", *self._files()])

    def place(self) -> str:
        return str(self.path.absolute())

    def licence(self) -> str | None:
        return card.licence(self.path / card.FILE)


class _Source(tensors.Source):
    """Tensors by the names of the family's table."""

    def __init__(self, path: Path, found: Mapping[str, Stored]) -> None:
        self.file, self.found = path, found

    def names(self) -> set[str]:
        return {*self.found}

    def read(self, name: str) -> np.ndarray:
        return self.found[name].array()

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]] | None:
        return self.found[name].pieces()
