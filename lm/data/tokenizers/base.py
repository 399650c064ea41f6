"""What a tokenizer is."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lm.errors import UserError
from lm.files import write_json


class Tokenizer(abc.ABC):
    """Text to ids and back. All ids lie below `vocab_size`. Encoding adds neither `bos_id` nor `eos_id`."""

    bos_id: int | None
    eos_id: int | None

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """A hash or name of all that determines the ids of a text."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    def with_own_end(self) -> Tokenizer:
        """The same with the end-of-document id that the tokenizer's own file names, where it names one."""
        return self

    def describe(self) -> dict[str, object]:
        """What `from_description` needs beside the files of `save`; JSON-ready."""
        return {"kind": "file", "bos_id": self.bos_id, "eos_id": self.eos_id}

    @abc.abstractmethod
    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Writes the tokenizer's file and ``tokenizer_config.json`` into `folder`, as `transformers` reads them.

        `chat_template`: Jinja source, kept in the latter. A tokenizer that has no file format writes nothing.
        """


class Vocabulary(Protocol):
    """A model's configuration, as far as `check_vocab` reads it."""

    @property
    def vocab_size(self) -> int: ...


def check_vocab(tokenizer: Tokenizer, config: Vocabulary) -> None:
    """Refuses a tokenizer that can emit ids the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size} ids, the model has model.vocab_size = {config.vocab_size}: "
            "foreign vocabulary; give the tokenizer the checkpoint was trained with"
        )


def write_config(
    folder: Path, settings: Mapping[str, object], special: Mapping[str, str | None], chat_template: str | None
) -> None:
    """``tokenizer_config.json``: `settings`, the `special` tokens, and the chat template if any."""
    about: dict[str, object] = {**settings, **special}
    if chat_template is not None:
        about["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", about, indent=2, ascii_only=False)
