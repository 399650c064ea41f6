"""What reads a checkpoint."""

from __future__ import annotations

import abc
from typing import Any

from lm.config import ModelConfig
from lm.data.record import TextRecord
from lm.interop.adapters.change import Change
from lm.sharding.layout import Where

HUB = "hf:"  # in front of a repository of the Hugging Face Hub
PLUS = " + "  # between a checkpoint and an adapter


class Reader(abc.ABC):
    """One checkpoint on disk. Weights are read when they are asked for, not before.

    Every method raises `UserError`, naming the file, for what is missing, damaged or foreign.
    """

    @abc.abstractmethod
    def model(self) -> dict[str, Any]:
        """The fields of its ``ModelConfig``, plugs by name."""

    @abc.abstractmethod
    def params(self, cfg: ModelConfig, change: Change | None = None, where: Where | None = None) -> dict[str, Any]:
        """The parameter tree of `cfg`, as arrays of ``cfg.param_dtype``.

        `change` is done to the tensors while they are read; `where` says on which devices a parameter lives, None =
        the first.
        """

    def model_type(self) -> str | None:
        """The ``model_type`` whose names of modules an adapter to it has; None = that of its configuration."""
        return None

    def dtype(self) -> str:
        """What most of its weights are stored as: ``float32``, ``float16`` or ``bfloat16``."""
        return "float32"

    @abc.abstractmethod
    def text(self) -> TextRecord:
        """What it says about its text: tokenizer, special tokens, templates, how answers are drawn."""

    @abc.abstractmethod
    def identity(self) -> str:
        """What stands for its contents: a hash of the files that determine model and weights, or their commit."""

    @abc.abstractmethod
    def place(self) -> str:
        """The name by which it is found from any working directory."""

    def licence(self) -> str | None:
        """What it says its licence is, None where it says nothing."""
        return None
