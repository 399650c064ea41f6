"""Hugging Face directories: config.json, safetensors (whole or sharded), tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import lm.interop.readers.schema as schema
import lm.interop.readers.tensors as tensors
from lm.config import ModelConfig
from lm.data.tokenizers import Tokenizer, from_directory
from lm.errors import UserError, unknown
from lm.interop.families import FAMILIES
from lm.interop.readers.base import Reader


def read_json(path: Path) -> Any:
    """The contents of a JSON file; `UserError` when it is not there or does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face directory needs config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None


class Directory(Reader):
    """A checkpoint directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf = read_json(path / "config.json")
        if not isinstance(self.hf, dict):
            raise UserError(f"{path / 'config.json'}: expected an object, found {type(self.hf).__name__}")
        schema.check(self.hf, path / "config.json")
        kind = self.hf.get("model_type")
        if kind not in FAMILIES:
            raise unknown(f"{path / 'config.json'} model_type", kind, FAMILIES)
        self.family = FAMILIES[kind]

    def model(self) -> dict[str, Any]:
        return self.family.read(self.hf)

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            listed = read_json(index)
            shards = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(shards, dict) or not shards or not all(isinstance(n, str) for n in shards.values()):
                raise UserError(f"{index}: 'weight_map' is missing, empty, or maps to something not a file name")
            files = [self.path / name for name in sorted(set(shards.values()))]
        elif (self.path / "model.safetensors").is_file():  # others beside it are adapters or another layout
            files = [self.path / "model.safetensors"]
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

    def params(self, cfg: ModelConfig) -> dict[str, Any]:
        head, prefix = self.family.head, self.family.prefix
        where: dict[str, tuple[Path, str]] = {}  # full name -> file, and the name there
        handles = {file: _open(file) for file in self._files()}
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                if name != head:
                    where[name if name.startswith(prefix) else prefix + name] = (file, name)
                elif not cfg.head.reads_embedding:
                    where[name] = (file, name)

        def get(name: str) -> np.ndarray:
            file, stored = where[name]
            try:
                return np.asarray(handles[file].get_tensor(stored)).astype(cfg.param_dtype)
            except (safetensors.SafetensorError, ValueError, TypeError) as e:
                raise UserError(f"{file}: tensor {stored!r} cannot be read ({e})") from None

        return tensors.fill(cfg, self.family.table, get, where, self.path)

    def tokenizer(self) -> Tokenizer | None:
        return from_directory(self.path, *reversed(self.special()))

    def special(self) -> tuple[int | None, int | None]:
        eos = self.hf.get("eos_token_id")
        return (eos[0] if isinstance(eos, list) and eos else eos), self.hf.get("bos_token_id")

    def chat_template(self) -> str | None:
        return chat_template(self.path)

    def identity(self) -> str:
        return tensors.content_hash([self.path / "config.json", *self._files()])


def chat_template(folder: Path) -> str | None:
    """Jinja source of ``chat_template.jinja`` or in ``tokenizer_config.json``; of several, the one named default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    about = read_json(folder / "tokenizer_config.json")
    template = about.get("chat_template") if isinstance(about, dict) else None
    if isinstance(template, list):
        default = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(default, {}).get("template")
    return template if isinstance(template, str) else None


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a complete safetensors file ({e})") from None
