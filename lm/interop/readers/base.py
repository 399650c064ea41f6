"""What reads a checkpoint."""

from __future__ import annotations

import abc
from typing import Any

from lm.config import ModelConfig
from lm.data.record import TextRecord


class Reader(abc.ABC):
    """One checkpoint on disk. Weights are read when they are asked for, not before.

    Every method raises `UserError`, naming the file, for what is missing, damaged or foreign.
    """

    @abc.abstractmethod
    def model(self) -> dict[str, Any]:
        """The fields of its ``ModelConfig``, plugs by name."""

    @abc.abstractmethod
    def params(self, cfg: ModelConfig) -> dict[str, Any]:
        """The parameter tree of `cfg`, as arrays of ``cfg.param_dtype``."""

    def dtype(self) -> str:
        """What most of its weights are stored as: ``float32``, ``float16`` or ``bfloat16``."""
        return "float32"

    @abc.abstractmethod
    def text(self) -> TextRecord:
        """What it says about its text: tokenizer, special tokens, templates, how answers are drawn."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A hash of the contents of the files that determine model and weights."""
