"""Answers as the API's clients read them, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.serving.asked import Asked
from experiments.serving.engine import Event, Fresh, Likely, Scored
from lm.data.tokenizers import Tokenizer
from lm.data.tokenizers.base import TORN


@dataclass(frozen=True)
class Token:
    """A token of a text: how it is spelled there, where it begins (characters), its log-probability (nats; None for the
    first of a prompt) and its alternatives, spelled likewise."""

    spelling: str
    start: int
    logprob: float | None
    top: dict[str, float]


class Spelling:
    """Tokens one after the other as pieces of one text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.length = tokenizer, list[int](), 0

    def add(
        self, ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Likely], marks: int = 0
    ) -> list[Token]:
        """The next tokens; the first `marks` are no part of the text."""
        out = []
        for i, token in enumerate(ids):
            likely = top[i] if i < len(top) else []
            others = [(self.spelled(t), p) for t, p in likely]
            own, logprob = self.spelled(token), logprobs[i]
            if likely and logprob is not None:
                others.append((own, logprob))
            named: dict[str, float] = {}
            for name, p in others:  # two tokens may be spelled alike
                named[name] = max(p, named.get(name, p))
            out.append(Token(own, self.length, logprob, named))
            self.length += len(self.piece(token)) if i >= marks else 0
            self.ids.append(token)
        return out

    def piece(self, token: int) -> str:
        """What a token adds to the text; nothing until a character is complete."""
        return self.tokenizer.continued(self.ids, [token]).rstrip(TORN)

    def spelled(self, token: int) -> str:
        """The same; of a token that is a part of a character, its id."""
        if self.tokenizer.is_special(token):
            return self.tokenizer.token(token) or f"token_id:{token}"
        text = self.tokenizer.continued(self.ids, [token])
        return f"token_id:{token}" if TORN in text or not text else text


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    finish: str | None = None
    tokens: list[Token] = field(default_factory=list)
    made: int = 0


class Reply:
    """What becomes of `asked`: fed with the events of its rows, read whole or piece by piece."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self.asked, self.model, self.tokenizer = asked, model, tokenizer
        self.id = ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.choices = [Choice() for _ in asked.rows]
        self.spelling = [Spelling(tokenizer) for _ in asked.rows]

    @property
    def finished(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def begin(self) -> Iterator[tuple[int, str, list[Token]]]:
        """What stands in a reply before the model has answered."""
        for i in range(len(self.choices)):
            if self.asked.chat:
                yield i, "", []
            elif self.asked.echo and not self.asked.scored:
                yield i, self._echo(i), []

    def _echo(self, i: int) -> str:
        text = self.asked.texts[i // self.asked.n]
        self.choices[i].text += text
        return text

    def add(self, i: int, event: Event) -> tuple[int, str, list[Token]]:
        """An event of row `i`: its new text and tokens."""
        choice, row = self.choices[i], self.asked.rows[i]
        if isinstance(event, Scored):
            prompt = list(row.prompt)
            tokens = self.spelling[i].add(prompt, [None, *event.logprobs], [[], *event.top], self.asked.marks)
            choice.tokens += tokens
            return i, self._echo(i), tokens
        assert isinstance(event, Fresh)
        if not choice.made and not self.asked.scored:
            spelling = self.spelling[i]
            spelling.ids = list(row.prompt)  # what the first new token continues
        tokens = []
        if self.asked.top is not None:
            tokens = self.spelling[i].add(event.tokens, event.logprobs, event.top)
        choice.text += event.text
        choice.tokens += tokens
        choice.made += len(event.tokens)
        choice.finish = event.finish or None
        return i, event.text, tokens

    def usage(self) -> dict[str, int]:
        read = sum(len(row.prompt) for row in self.asked.rows[:: self.asked.n])
        made = sum(choice.made for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def whole(self) -> dict[str, Any]:
        """The reply of a request that is not streamed."""
        choices = []
        for i, choice in enumerate(self.choices):
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            own = text if self.asked.chat else {"text": choice.text}
            choices.append(
                {"index": i, **own, "logprobs": self._logprobs(choice.tokens), "finish_reason": choice.finish}
            )
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def piece(self, i: int, text: str, tokens: list[Token], first: bool = False) -> dict[str, Any]:
        """One object of a stream."""
        if self.asked.chat:
            own: dict[str, Any] = {"delta": {"role": "assistant", "content": text} if first else {"content": text}}
        else:
            own = {"text": text}
        finish = self.choices[i].finish
        choice = {"index": i, **own, "logprobs": self._logprobs(tokens), "finish_reason": finish}
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def last(self) -> dict[str, Any]:
        """The object of a stream that says how many tokens it took."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def _head(self, chat: str) -> dict[str, Any]:
        kind = chat if self.asked.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        if self.asked.chat:
            return {"content": [_chat_token(t, self.asked.top) for t in tokens], "refusal": None}
        return {
            "tokens": [t.spelling for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [t.top or None for t in tokens] if self.asked.top else None,
            "text_offset": [t.start for t in tokens],
        }


def _chat_token(token: Token, top: int) -> dict[str, Any]:
    ordered = sorted(token.top.items(), key=lambda pair: -pair[1])[:top]
    return {
        **_spelled(token.spelling, token.logprob),
        "top_logprobs": [_spelled(name, logprob) for name, logprob in ordered],
    }


def _spelled(name: str, logprob: float | None) -> dict[str, Any]:
    data = None if name.startswith("token_id:") else list(name.encode())
    return {"token": name, "logprob": logprob, "bytes": data}
