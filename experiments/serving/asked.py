"""A request as rows for the model: everything that can be wrong with it is found here, before anything waits."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from experiments.commands.generate import Opened, default_sampling, seed_of
from experiments.serving.fields import ALTERNATIVES, CHAT, TEXT, Fields
from experiments.serving.refusal import Refused
from lm.data.chat import Message
from lm.data.record import DRAWN
from lm.decoding import Row, Sampling
from lm.errors import UserError, nearest
from lm.plug import SEEDS

T = TypeVar("T")
SHORT = 16  # tokens of a text that says no number: the API's own default
ANSWERS = 128  # of one prompt


@dataclass(frozen=True)
class Limits:
    """`length`: tokens of prompt and answer together; `answer`: tokens of a chat's answer where a request says no
    number; `rows`: answers of one request."""

    length: int
    answer: int = 512
    rows: int = 64


@dataclass(frozen=True)
class Asked:
    """One request. `texts`: what the prompts say, for `echo`; `rows`: `n` answers per prompt, one after the other;
    `top`: alternatives per token, None where no log-probabilities are asked for; `marks`: how many first tokens of a
    prompt are the tokenizer's own and no part of its text."""

    chat: bool
    texts: list[str]
    rows: list[Row]
    n: int = 1
    stops: list[str] = field(default_factory=list)
    top: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False
    marks: int = 0

    @property
    def scored(self) -> bool:
        """Whether the prompts' tokens are scored."""
        return self.echo and self.top is not None


class Reader:
    """Requests to `model`, which is called `name`."""

    def __init__(self, model: Opened, name: str, limits: Limits, template: str | None = None) -> None:
        self.model, self.name, self.limits, self.template = model, name, limits, template

    def text(self, body: bytes) -> Asked:
        """A body of ``/v1/completions``; raises `Refused`."""
        f = self._fields(body, TEXT)
        tokenizer, given = self.model.tokenizer, f.prompts()
        prompts, marks = [], 0
        for i, prompt in enumerate(given):
            if isinstance(prompt, str):
                prompt, marks = _obeyed("prompt", partial(self._encoded, prompt, f"prompt {i}")), len(tokenizer.before)
            prompts.append(prompt)
        new = f.whole("max_tokens", 0)
        echo = f.flag("echo")
        rows, n = self._answers(f, prompts, "prompt", SHORT if new is None else new)
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in given]
        top = f.whole("logprobs", 0, ALTERNATIVES)
        return Asked(False, texts, rows, n, f.stops(), top, echo, f.flag("stream"), f.usage(), marks)

    def chat(self, body: bytes) -> Asked:
        """A body of ``/v1/chat/completions``; raises `Refused`."""
        f = self._fields(body, CHAT)
        turns = f.messages()
        prompt = _obeyed("messages", lambda: self._conversation(turns))
        said = {key: f.whole(key, 1) for key in ("max_tokens", "max_completion_tokens")}
        given = {value for value in said.values() if value is not None}
        if len(given) > 1:
            raise Refused("max_tokens: is not max_completion_tokens; valid: one of them", param="max_tokens")
        new = next(iter(given), max(min(self.limits.answer, self.limits.length - len(prompt)), 1))
        rows, n = self._answers(f, [prompt], "messages", new)
        wanted, top = f.flag("logprobs"), f.whole("top_logprobs", 0, ALTERNATIVES)
        if top is not None and not wanted:
            raise Refused("top_logprobs: needs logprobs; valid: without it, or with logprobs", param="top_logprobs")
        return Asked(True, [""], rows, n, f.stops(), (top or 0) if wanted else None, False, f.flag("stream"), f.usage())

    @property
    def _rows(self) -> int:
        return self.model.cfg.vocab_size

    def _encoded(self, prompt: str, what: str) -> list[int]:
        return self.model.header.text.encode(prompt, self._rows, what)

    def _conversation(self, turns: list[Message]) -> list[int]:
        return self.model.conversation(turns, "messages", template=self.template)

    def _fields(self, body: bytes, valid: tuple[str, ...]) -> Fields:
        f = Fields(body, valid)
        asked = f.text("model", self.name)
        if asked != self.name:
            raise Refused(
                f"model: unknown name {asked!r}{nearest(str(asked), [self.name])}; valid: {self.name}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return f

    def _answers(self, f: Fields, prompts: list[list[int]], what: str, new: int) -> tuple[list[Row], int]:
        n = f.whole("n", 1, ANSWERS) or 1
        if n * len(prompts) > self.limits.rows:
            raise Refused(
                f"n: {n} answers to {len(prompts)} prompts; valid: at most {self.limits.rows} in one request", param="n"
            )
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise Refused(f"{what} {i}: is empty; valid: at least one token", param=what)
            beyond = next((t for t in prompt if not 0 <= t < self._rows), None)
            if beyond is not None:
                raise Refused(f"{what} {i}: unknown token id {beyond}; valid: 0 to {self._rows - 1}", param=what)
            if len(prompt) + new > self.limits.length:
                raise Refused(
                    f"{what} {i}: {len(prompt)} tokens and {new} new ones; valid: at most {self.limits.length} in all",
                    param=what,
                    code="context_length_exceeded",
                )
        sampling = self._sampling(f)
        seed = f.whole("seed", 0, SEEDS - 1)
        seed = secrets.randbelow(SEEDS) if seed is None else seed
        return [Row(prompt, sampling, seed_of(seed, s), new) for prompt in prompts for s in range(n)], n

    def _sampling(self, f: Fields) -> Sampling:
        """What the request says, else what the checkpoint does, else the API's default: temperature 1."""
        asked = {name: f.number(name) for name in DRAWN if name != "top_k"} | {"top_k": f.whole("top_k", 0)}
        given = {name: value for name, value in asked.items() if value is not None}
        said = default_sampling(self.model.header.text.generation, given, silent=1.0)
        penalties = {name: f.number(name) or 0.0 for name in ("presence_penalty", "frequency_penalty")}
        made: Mapping[str, Any] = {**said, **given, **penalties}
        sampling = _obeyed(None, lambda: Sampling(**made, bias=f.bias()))
        _obeyed("logit_bias", lambda: sampling.check(self._rows))
        return sampling


def _obeyed(param: str | None, fn: Callable[[], T]) -> T:
    """What `fn` makes; a mistake that it names is the request's."""
    try:
        return fn()
    except Refused:
        raise
    except UserError as e:
        words = str(e).removeprefix("--chat: ")
        raise Refused(words, param=param or words.partition(":")[0]) from None
