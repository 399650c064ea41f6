"""What reads a checkpoint."""

from __future__ import annotations

import abc
from typing import Any

from lm.config import ModelConfig
from lm.data.tokenizers import Tokenizer


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

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None: ...

    @abc.abstractmethod
    def special(self) -> tuple[int | None, int | None]:
        """(eos, bos) ids."""

    @abc.abstractmethod
    def chat_template(self) -> str | None:
        """Jinja source; None for a model that is not tuned to converse."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A hash of the contents of the files that determine model and weights."""
