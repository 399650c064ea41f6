"""The record itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.data.chat import Message, Rendered, choose, render
from lm.data.tokenizers import Tokenizer, check_ids
from lm.errors import UserError
from lm.files import write_json

MARK = "ANSWER"  # what the model says in the conversation that shows how a turn ends


@dataclass(frozen=True)
class TextRecord:
    """What a checkpoint says about its text.

    * `tokenizer`: ids of a text, with what its own rule puts around it; None where there is none.
    * `words`: named special tokens as templates see them (``bos_token`` -> ``<s>``); a name without a token is absent.
    * `bos_id`, `pad_id`: the beginning of a text and the filling, None where nobody names them.
    * `eos_ids`: every id that its files call an end, in their order.
    * `templates`: Jinja sources by name, ``default`` the first choice; empty for a model not tuned to converse.
    * `generation`: ``generation_config.json`` as it stands. `settings`: ``tokenizer_config.json`` as it stands.
    """

    tokenizer: Tokenizer | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = "the model"

    @staticmethod
    def of(tokenizer: Tokenizer | None, chat_template: str | None = None, source: str = "the model") -> TextRecord:
        """What a tokenizer of ours says, which has no files beside its own."""
        if tokenizer is None:
            return TextRecord(source=source)
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        words = {name: tokenizer.token(i) for name, i in ids.items() if i is not None}
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        templates = {} if chat_template is None else {"default": chat_template}
        return TextRecord(tokenizer, words, tokenizer.bos_id, ends, templates=templates, source=source)

    @property
    def eos_id(self) -> int | None:
        """The first of the ends: what ends a document."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the ends, and what the template puts behind a turn of the model."""
        turn = self.end_of_turn()
        return self.eos_ids if turn is None or turn in self.eos_ids else (*self.eos_ids, turn)

    def end_of_turn(self) -> int | None:
        """The mark that the template puts directly behind an answer; None where it puts text or nothing there."""
        if self.tokenizer is None or not self.templates:
            return None
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": MARK}]
        try:
            made = self.render(turns, add_generation_prompt=False).text
        except UserError:  # a template that wants another conversation
            return None
        _, found, behind = made.rpartition(MARK)
        ids = self.tokenizer.encode(behind.lstrip()) if found and behind.strip() else []
        return ids[0] if ids and self.tokenizer.is_special(ids[0]) else None

    def needs_tokenizer(self, key: str) -> Tokenizer:
        """The tokenizer; `UserError` naming `key` where there is none."""
        if self.tokenizer is None:
            raise UserError(
                f"{key}: {self.source} has no tokenizer; valid: one with tokenizer.json, tokenizer.model or a GGUF file"
            )
        return self.tokenizer

    def encode(self, text: str, vocab_size: int, what: str) -> list[int]:
        """A text as the checkpoint's own rule begins and ends it. Raises `UserError` for a token without a row."""
        tokenizer = self.needs_tokenizer(what)
        return check_ids(tokenizer, tokenizer.encode_text(text), vocab_size, what)

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """A conversation as text, by the template of that name (`lm.data.chat`)."""
        source = choose(self.templates, template, tools is not None, self.source)
        return render(
            source,
            messages,
            self.source,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **self.words,
        )

    def chat(self, messages: Sequence[Message], vocab_size: int, what: str, **choices: Any) -> list[int]:
        """A conversation as ids. The template writes its own first token, so the tokenizer's rule adds none."""
        tokenizer = self.needs_tokenizer(what)
        return check_ids(tokenizer, tokenizer.encode(self.render(messages, **choices).text), vocab_size, what)

    @property
    def config(self) -> dict[str, Any]:
        """The ids that ``config.json`` names."""
        ends = list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_id
        pad = {} if self.pad_id is None else {"pad_token_id": self.pad_id}
        return {"bos_token_id": self.bos_id, "eos_token_id": ends, **pad}

    def describe(self) -> dict[str, object]:
        """What a run's description says beside the files of `save`; JSON-ready."""
        if self.tokenizer is None:
            return {}
        return {**self.tokenizer.describe(), "bos_id": self.bos_id, "eos_ids": list(self.eos_ids)}

    def save(self, folder: Path) -> None:
        """Writes all of it as `transformers` reads it: the tokenizer's file, ``tokenizer_config.json``,
        ``generation_config.json``."""
        ids = {name: value for name, value in self.config.items() if value is not None}
        write_json(folder / "generation_config.json", {**ids, **self.generation}, indent=2, ascii_only=False)
        if self.tokenizer is None:
            return
        own = self.tokenizer.save(folder)
        if not list(folder.glob("tokenizer.*")):
            return
        about = {**own, **self.settings, **{k: own[k] for k in ("added_tokens_decoder",) if k in own}, **self.words}
        if set(self.templates) == {"default"}:
            about["chat_template"] = self.templates["default"]
        elif self.templates:
            about["chat_template"] = [{"name": n, "template": t} for n, t in self.templates.items()]
        write_json(folder / "tokenizer_config.json", about, indent=2, ascii_only=False)
