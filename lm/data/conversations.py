"""Conversations as documents, of which the assistant's answers alone are learned, or all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data import corpus, texts
from lm.data.chat import Rendered, choose
from lm.data.corpus import Corpus, Encoded
from lm.data.record import TextRecord
from lm.data.texts import Document
from lm.errors import UserError, unknown
from lm.files import parse_json, read_text, user_path

COLUMNS = ("messages", "tools")
KEY = "train.data.template"
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
}
_MARKS = re.compile(r"\{%[-+]?\s*generation\b")
_REMARKS = re.compile(r"\{#.*?#\}", re.DOTALL)
_VERSION = 1  # raise when other tokens count as answers


def documents(spec: str) -> list[Document]:
    """All that `stream` gives."""
    return list(stream(spec))


def stream(spec: str) -> Iterator[Document]:
    """The conversations of `spec` (`lm.data.texts.records`): a document's text is its messages and tools as JSON.

    Raises `UserError` naming the row whose ``messages`` is no list of messages, or whose ``tools`` is no list.
    """
    some = False
    for name, where, row in texts.records(spec, COLUMNS):
        said = {key: value for key, value in _checked(row, where).items() if value}
        some = True
        yield Document(name, json.dumps(said, ensure_ascii=True), where, "the user's own; not known")
    if not some:
        raise UserError(f"texts: {spec!r} has no conversations; valid: rows with 'messages'")


def _checked(row: Mapping[str, object], where: str) -> dict[str, Any]:
    if "messages" not in row:
        raise UserError(
            f"{where}: field 'messages' is missing; fields present: {', '.join(sorted(row)[:12]) or 'none'}"
        )
    messages, tools = _whole(row["messages"]), row.get("tools")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise UserError(f"{where}: field 'messages': valid: a list of objects with 'role' and 'content'")
    if isinstance(tools, str):  # columns of one type keep them as JSON
        try:
            tools = parse_json(tools, where) if tools.strip() else None
        except UserError:
            raise UserError(f"{where}: field 'tools': text that is no JSON; valid: a list of objects") from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: field 'tools': found {type(tools).__name__}; valid: a list of objects")
    return {"messages": messages, "tools": _whole(tools)}


def _whole(value: object) -> Any:
    """Without keys that hold None: a table's columns give every object the keys of all others."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items() if v is not None}
    return [_whole(v) for v in value] if isinstance(value, list) else value


def with_template(text: TextRecord, template: str) -> TextRecord:
    """The record with a template that it did not come with, as its first choice; raises `UserError` where none is."""
    if template.endswith(".jinja"):
        path = user_path(template, KEY)
        try:
            return dataclasses.replace(text, templates={"default": read_text(path, f"{KEY}: ")})
        except FileNotFoundError:
            raise UserError(f"{KEY}: {template}: no such file; valid: a file of UTF-8 text") from None
    if template in text.templates:
        return text
    if template in TEMPLATES:
        return dataclasses.replace(text, templates={"default": TEMPLATES[template]})
    if template:
        raise unknown(KEY, template, [*text.templates, *TEMPLATES, "FILE.jinja"])
    if not text.templates:
        raise UserError(
            f"{KEY}: {text.source} has no chat template; valid: {', '.join(TEMPLATES)}, a .jinja file, or a checkpoint "
            "tuned to converse"
        )
    return text


@dataclass(frozen=True)
class Conversations:
    """Conversations by the template `name` of `text` (None = its first choice), as an encoder of a corpus.

    `answers`: the assistant's answers alone are to be predicted, else all.
    """

    text: TextRecord
    name: str | None = None
    answers: bool = True

    @property
    def identity(self) -> str:
        t = self.text
        said = [_VERSION, t.needs_tokenizer(KEY).identity, dict(t.templates), self.name, dict(t.words), t.stop_ids]
        return ("chat " if self.answers else "whole chat ") + json.dumps(said, sort_keys=True)

    @property
    def vocab_size(self) -> int:
        return self.text.needs_tokenizer(KEY).vocab_size

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        stops = self.text.stop_ids
        return [self._one(doc, stops) for doc in documents]

    def _one(self, doc: Document, stops: Sequence[int]) -> Encoded:
        said = json.loads(doc.text)
        messages, tools = said.get("messages", []), said.get("tools")
        if not any(m["role"] == "assistant" or not self.answers for m in messages):
            return Encoded([], 0, [])  # nothing to learn; left out by `tokenize`
        try:
            if self.answers:
                made, marked = self._spans(messages, tools)
            else:
                made = self.text.render(messages, template=self.name, tools=tools, add_generation_prompt=False)
        except UserError as e:
            found = re.sub(r"^--(chat|template): ", "", str(e))
            raise UserError(f"train.data.texts: {doc.source}: {found}") from None
        n_bytes = len(made.text.encode("utf-8", "surrogatepass"))
        if not self.answers:
            return Encoded(self.text.needs_tokenizer(KEY).encode(made.text), n_bytes)
        ids, ranges = self.text.needs_tokenizer(KEY).encode_spans(made.text, made.answers)
        learned = np.zeros(len(ids), bool)
        for a, b in ranges:
            if marked:  # the mark that ends the turn is part of it, also where the template leaves it out
                b += b > a and b < len(ids) and ids[b] in stops and (b == 0 or ids[b - 1] not in stops)
            else:  # and what stands behind that mark is not
                b = next((i + 1 for i in range(b - 1, a - 1, -1) if ids[i] in stops), b)
            learned[a:b] = True
        return Encoded(ids, n_bytes, learned.tolist())

    def _spans(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[Rendered, bool]:
        """The text with the ranges of its answers, and whether the template marks them itself."""

        def render(n: int, prompt: bool) -> Rendered:
            return self.text.render(messages[:n], template=self.name, tools=tools, add_generation_prompt=prompt)

        whole = render(len(messages), False)
        source = choose(self.text.templates, self.name, tools is not None, self.text.source)
        if _MARKS.search(_REMARKS.sub("", source)):
            return whole, True
        spans = []
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            before, upto = render(i, True).text, render(i + 1, False).text
            if not (upto.startswith(before) and whole.text.startswith(upto)):
                raise UserError(
                    f"the template of {self.text.source} writes message {i + 1} differently once others follow, and "
                    "does not mark answers; valid: a template with {% generation %}, or one turn a conversation"
                )
            spans.append((len(before), len(upto)))
        return Rendered(whole.text, tuple(spans)), False


def tokenize(
    found: Iterable[Document],
    text: TextRecord,
    template: str,
    seq_len: int,
    cache: Path,
    learn: str = "answers",
    overlong: str = "split",
) -> Corpus:
    """The corpus of conversations; those without an answer (`learn` ``all``: without text) are left out, and said.

    Those of more than `seq_len` + 1 tokens, which a row has not, are said too: `overlong` is ``split`` (into pieces
    that do not see each other), ``truncate`` (the beginning is kept) or ``drop``.
    Raises `UserError` for a conversation that the template refuses, and where nothing is left to learn.
    """
    name = template if template in text.templates else None
    made = corpus.tokenize(found, Conversations(text, name, learn == "answers"), cache)
    size = seq_len + 1
    cut = size if overlong == "truncate" else None
    useful = _useful(made, cut)
    some, what = ("an", "answer of the assistant") if learn == "answers" else ("any", "text")
    where = "" if cut is None else f" within train.data.seq_len = {seq_len} tokens"
    _tell(f"has no {what}{where} and is left out", found, ~useful)
    if not useful.any():
        raise UserError(f"train.data.texts: none of {len(made)} conversations has {some} {what}{where}")
    over = useful & (np.diff(made.offsets) > size)
    _tell(f"is longer than train.data.seq_len = {seq_len} tokens: {_OVERLONG[overlong]}", found, over)
    if overlong == "drop":
        useful &= ~over
        if not useful.any():
            raise UserError(
                f"train.data.seq_len: all conversations are longer than {seq_len} tokens, and train.data.overlong = "
                "drop leaves them out; valid: a longer seq_len, or overlong = truncate or split"
            )
    how = f", {overlong} {size}" if overlong != "split" and over.any() else ""
    if useful.all() and not how:
        return made
    return corpus.take(made, np.flatnonzero(useful), "answered" + how, cut)


_OVERLONG = {
    "split": "its pieces do not see each other",
    "truncate": "what lies beyond is left out",
    "drop": "it is left out",
}


def _useful(made: Corpus, cut: int | None) -> np.ndarray:
    """bool ``[n]``: which conversations have a token to predict among their first `cut` (None = all)."""
    offsets, answers = made.offsets, made.answers
    stops = offsets[1:] if cut is None else np.minimum(offsets[1:], offsets[:-1] + cut)
    if answers is None:
        return np.asarray(stops - offsets[:-1] > 1)
    # A first token has nothing to be predicted from.
    return np.fromiter((answers[a + 1 : b].any() for a, b in zip(offsets[:-1], stops, strict=True)), bool, len(made))


def _tell(what: str, found: Iterable[Document], which: np.ndarray) -> None:
    """Says it of the first of the conversations that `which`, bool ``[n]``, marks, and how many more there are."""
    if which.any():
        first = next(itertools.islice(found, int(which.argmax()), None))
        more = f" (and {which.sum() - 1} more)" if which.sum() > 1 else ""
        print(f"note: {first.source}: the conversation {what}{more}", file=sys.stderr)
