"""GGUF files, dequantised to float32 with the `gguf` library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

import lm.interop.readers.tensors as tensors
from lm.config import ModelConfig
from lm.data.record import TextRecord, from_gguf
from lm.errors import UserError, unknown
from lm.interop.adapters.change import Change
from lm.interop.families.table import Table, flip, same
from lm.interop.readers.base import Reader
from lm.interop.readers.gguf_fields import contents
from lm.interop.readers.schema import epsilon
from lm.sharding.layout import Where


def _pairs_to_halves(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Rows of Q and K are stored so that rotations act on adjacent pairs; ours act on the halves of a head."""
    d = cfg.head_dim
    assert d is not None
    return x.reshape(-1, d // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _halved_flip(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return _pairs_to_halves(x, cfg).T


def _table(permuted: bool) -> Table:
    qk = (_halved_flip, _pairs_to_halves) if permuted else (flip, same)
    out: Table = {
        "embed": ("token_embd.weight", same),
        "final_norm/scale": ("output_norm.weight", same),
        "head/kernel": ("output.weight", flip),
        "attn_norm/scale": ("blk.{i}.attn_norm.weight", same),
        "ffn_norm/scale": ("blk.{i}.ffn_norm.weight", same),
        "attn/q_norm/scale": ("blk.{i}.attn_q_norm.weight", same),
        "attn/k_norm/scale": ("blk.{i}.attn_k_norm.weight", same),
        "attn/o/kernel": ("blk.{i}.attn_output.weight", flip),
        "attn/v/kernel": ("blk.{i}.attn_v.weight", flip),
        "attn/v/bias": ("blk.{i}.attn_v.bias", same),
    }
    for n in "qk":
        out[f"attn/{n}/kernel"] = (f"blk.{{i}}.attn_{n}.weight", qk[0])
        out[f"attn/{n}/bias"] = (f"blk.{{i}}.attn_{n}.bias", qk[1])
    for n in ("gate", "up", "down"):
        out[f"ffn/{n}/kernel"] = (f"blk.{{i}}.ffn_{n}.weight", flip)
    return out


ARCHITECTURES = {"llama": _table(True), "qwen2": _table(False), "qwen3": _table(False)}


class _Source(tensors.Source):
    """A file's tensors, dequantised when they are read."""

    def __init__(self, reader: File) -> None:
        self.file, self.reader = reader.path, reader

    def names(self) -> set[str]:
        return {n for n in self.reader.tensors if n != "rope_freqs.weight"}

    def read(self, name: str) -> np.ndarray:
        return self.reader.read(name)


class _Fields(GGUFReader):  # type: ignore[misc]
    """The library's reader on a plain view of the mapped file: slices of `numpy.memmap` keep books, and a vocabulary is
    hundreds of thousands of slices (SmolLM2-135M opens in 1.3 s of processor time, not 3.5)."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


class File(Reader):
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        try:
            self.reader = _Fields(str(path))
        except Exception as e:  # the library raises whatever its parsing runs into
            raise UserError(f"{path}: not a complete GGUF file ({type(e).__name__}: {e})") from None
        self.parts = self._parts()
        self.tensors = {t.name: t for part in self.parts for t in part.tensors}
        self.arch = self._field("general.architecture")
        if self.arch not in ARCHITECTURES:
            raise unknown(f"{path} general.architecture", self.arch, ARCHITECTURES)

    def _field(self, key: str, default: float | str | None = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else contents(self.path, key, field)

    def _parts(self) -> list[Any]:
        """The readers of all parts of a file that was split, this one the first of them."""
        count = int(self._field("split.count", 0) or 0)
        if count < 2:
            return [self.reader]
        if int(self._field("split.no", 0) or 0) != 0:
            raise UserError(f"{self.path}: part {self._field('split.no') + 1} of {count}; valid: the first part")
        found = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", self.path.name)
        if found is None:
            raise UserError(
                f"{self.path}: the first of {count} parts; valid: a name that ends in -00001-of-{count:05}.gguf"
            )
        readers = [self.reader]
        self.files += [self.path.with_name(f"{found[1]}-{i:05}-of-{found[2]}.gguf") for i in range(2, count + 1)]
        for path in self.files[1:]:
            if not path.is_file():
                raise UserError(f"{path}: no such file, though {self.path.name} is the first of {count} parts")
            try:
                readers.append(_Fields(str(path)))
            except Exception as e:
                raise UserError(f"{path}: not a complete GGUF file ({type(e).__name__}: {e})") from None
        return readers

    def dtype(self) -> str:
        kinds = [t.tensor_type.name for t in self.tensors.values()]
        common = max(set(kinds), key=kinds.count, default="F32")
        return {"F16": "float16", "BF16": "bfloat16"}.get(common, "float32")

    def _need(self, key: str) -> Any:
        value = self._field(f"{self.arch}.{key}")
        if value is None:
            raise UserError(f"{self.path}: metadata {self.arch}.{key!r} is missing")
        if isinstance(value, list):
            raise UserError(f"{self.path}: {self.arch}.{key} differs by layer; valid: one number")
        return value

    def _one(self, key: str, default: float) -> float:
        """A number that a file may leave out."""
        return float(default if self._field(f"{self.arch}.{key}") is None else self._need(key))

    def model(self) -> dict[str, Any]:
        heads, width = self._need("attention.head_count"), self._need("embedding_length")
        head_dim = self._field(f"{self.arch}.attention.key_length", width // heads if heads else 0)
        rotated = self._field(f"{self.arch}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise UserError(
                f"{self.path}: {self.arch}.rope.dimension_count = {rotated}; valid: {head_dim}, a head's width"
            )
        embed = self.tensors.get("token_embd.weight")
        if embed is None:
            raise UserError(f"{self.path}: tensor 'token_embd.weight' is missing")
        # Only here do all layers have the window; qwen files may carry a width that their model does not use.
        window = self._field("llama.attention.sliding_window") if self.arch == "llama" else None
        return {
            "pattern": {"name": "sliding_window", "window": window} if window else {"name": "causal"},
            "vocab_size": int(embed.shape[1]),
            "d_model": width,
            "n_layers": self._need("block_count"),
            "n_heads": heads,
            "n_kv_heads": self._field(f"{self.arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "d_ff": self._need("feed_forward_length"),
            "max_positions": self._need("context_length"),
            "norm": {"name": "rmsnorm", "eps": self._epsilon()},
            "positions": self._rope(),
            "ffn": {"name": "swiglu"},
            "head": {"name": "linear", "tie": "output.weight" not in self.tensors},
            "mixer": {
                "name": "softmax",
                "qkv_bias": "blk.0.attn_q.bias" in self.tensors,
                "qk_norm": "blk.0.attn_q_norm.weight" in self.tensors,
            },
        }

    def _epsilon(self) -> float:
        key = "attention.layer_norm_rms_epsilon"
        found = self._need(key)
        if not epsilon(found):
            raise UserError(f"{self.path}: {self.arch}.{key} = {found!r}; valid: a number from 0 to 1")
        return float(found)

    def _rope(self) -> dict[str, Any]:
        theta = self._one("rope.freq_base", 10000.0)
        kind = self._field(f"{self.arch}.rope.scaling.type", "none")
        scaling: dict[str, Any] = {"name": "default"}
        if "rope_freqs.weight" in self.tensors:  # Llama 3's divisors, spelled out per frequency
            divisors = [float(x) for x in self.read("rope_freqs.weight")]
            scaling = {"name": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0}
        elif kind in ("linear", "yarn"):
            scaling = {"name": kind, "factor": self._one("rope.scaling.factor", 1.0)}
            original = int(self._one("rope.scaling.original_context_length", 0))
            if kind == "yarn" and original:
                scaling["original"] = original
        elif kind not in ("none", None):
            raise unknown(f"{self.path} {self.arch}.rope.scaling.type", kind, ("none", "linear", "yarn"))
        return {"name": "rope", "theta": theta, "scaling": scaling}

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32. Raises `UserError` for one that is damaged."""
        tensor = self.tensors[name]
        try:
            value = dequantize(tensor.data, tensor.tensor_type)
            return np.asarray(value, np.float32).reshape(tuple(int(n) for n in tensor.shape[::-1]))
        except (ValueError, NotImplementedError, IndexError) as e:
            raise UserError(f"{self.path}: tensor {name!r} cannot be read ({e})") from None

    def params(self, cfg: ModelConfig, change: Change | None = None, where: Where | None = None) -> dict[str, Any]:
        return tensors.fill(cfg, ARCHITECTURES[self.arch], _Source(self), change, where)

    def text(self) -> TextRecord:
        return from_gguf(self._field, str(self.path))

    def identity(self) -> str:
        return tensors.content_hash(self.files)

    def place(self) -> str:
        return str(self.path.absolute())

    def licence(self) -> str | None:
        said = self._field("general.license")
        return said if isinstance(said, str) else None
