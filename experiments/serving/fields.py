"""The fields of a request: each is obeyed, or refused by name with what is valid."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.serving.refusal import Refused
from lm.data.chat import Message
from lm.errors import nearest

# What other servers do with a field and this one does not, by the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "store": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
}
SHARED = (
    "model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "logprobs", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "typical_p", "repetition_penalty",
)  # fmt: skip
TEXT = (*SHARED, "prompt", "echo")
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs")
MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
STOPS = 16  # stop texts of one request
ALTERNATIVES = 20  # per token


def _constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


class Fields:
    """The object of a request's body; a field that is null is absent. Every reader raises `Refused`."""

    def __init__(self, body: bytes, valid: Sequence[str]) -> None:
        try:
            data = json.loads(body, parse_constant=_constant)
            json.dumps(data, ensure_ascii=False).encode()  # half a character has no bytes
        except (ValueError, RecursionError) as e:
            raise Refused(f"the body is not JSON ({e}); valid: an object") from None
        if not isinstance(data, dict):
            raise Refused(f"the body is {_kind(data)}; valid: an object")
        self.data = {name: value for name, value in data.items() if value is not None}
        for name, value in self.data.items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                asks = " or ".join(json.dumps(v) for v in NEUTRAL[name])
                raise Refused(f"{name}: not supported; valid: {asks}, or without it", param=name, code="unsupported")
            if name not in valid and name not in NEUTRAL:
                raise Refused(
                    f"{name}: unknown or unsupported field{nearest(name, valid)}; valid: {', '.join(sorted(valid))}",
                    param=name,
                    code="unsupported",
                )

    def wrong(self, name: str, valid: str) -> Refused:
        found = json.dumps(self.data[name], ensure_ascii=False)
        return Refused(f"{name}: found {found[:80]}; valid: {valid}", param=name)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.data.get(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.data.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """An integer in ``[low, high]``, None where there is none."""
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise self.wrong(name, f"{low} to {high}" if high is not None else f"a whole number of {low} or more")
        return value

    def number(self, name: str) -> float | None:
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return float(value)

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        value = self.data.get("stop", [])
        listed = [value] if isinstance(value, str) else value
        good = isinstance(listed, list) and len(listed) <= STOPS and all(isinstance(s, str) and s for s in listed)
        if not good:
            raise self.wrong("stop", f"a text, or a list of at most {STOPS}, none of them empty")
        return list(listed)

    def bias(self) -> tuple[tuple[int, float], ...]:
        """(token id, added logit) pairs."""
        value = self.data.get("logit_bias", {})
        valid = 'an object of token ids and numbers, for example {"13": -100}'
        if not isinstance(value, dict):
            raise self.wrong("logit_bias", valid)
        out = []
        for token, added in value.items():
            number = isinstance(added, (int, float)) and not isinstance(added, bool) and math.isfinite(added)
            if not (token.isascii() and token.isdigit() and number):
                raise self.wrong("logit_bias", valid)
            out.append((int(token), float(added)))
        return tuple(out)

    def usage(self) -> bool:
        """Whether a stream ends with how many tokens it took."""
        value = self.data.get("stream_options")
        if value is None:
            return False
        if not self.flag("stream"):
            raise Refused("stream_options: needs stream; valid: without it, or with stream", param="stream_options")
        good = isinstance(value, dict) and set(value) <= {"include_usage"}
        if not good or not isinstance(value.get("include_usage", False), bool):
            raise self.wrong("stream_options", '{"include_usage": true or false}')
        return bool(value.get("include_usage", False))

    def prompts(self) -> list[str | list[int]]:
        """One text, or one list of ids, per prompt."""
        value = self.data.get("prompt")
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(x, str) for x in value):
                return list(value)
            if _ids(value):
                return [value]
            if all(isinstance(x, list) and x and _ids(x) for x in value):
                return list(value)
        valid = "a text, a list of texts, a list of token ids, or a list of such lists"
        if value is None:
            raise Refused(f"prompt: none given; valid: {valid}", param="prompt")
        raise self.wrong("prompt", valid)

    def messages(self) -> list[Message]:
        """The conversation as templates read it; a content in several parts of text as one, a line each."""
        value = self.data.get("messages")
        if not isinstance(value, list) or not value:
            raise Refused("messages: none given; valid: a list of objects with role and content", param="messages")
        return [_message(f"messages.{i}", one) for i, one in enumerate(value)]


def _kind(value: object) -> str:
    names = {"list": "a list", "str": "a string", "int": "a number", "float": "a number", "bool": "a boolean"}
    return names.get(type(value).__name__, "null")


def _ids(value: Sequence[object]) -> bool:
    return all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def _message(place: str, one: object) -> Message:
    if not isinstance(one, Mapping):
        raise Refused(f"{place}: is {_kind(one)}; valid: an object with role and content", param=place)
    out = {key: value for key, value in one.items() if value is not None}
    for key in out:
        if key not in MESSAGE and out[key] != []:
            raise Refused(
                f"{place}.{key}: unknown or unsupported field{nearest(key, MESSAGE)}; valid: {', '.join(MESSAGE)}",
                param=f"{place}.{key}",
                code="unsupported",
            )
    if not isinstance(out.get("role"), str):
        raise Refused(f"{place}.role: none given; valid: system, user, assistant or tool", param=f"{place}.role")
    content = out.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise Refused(
                f"{place}.content: has a part that is no text; valid: a string, or parts of type text",
                param=f"{place}.content",
                code="unsupported",
            )
        out["content"] = "\n".join(p["text"] for p in content)
    elif not isinstance(content, str):
        raise Refused(f"{place}.content: is {_kind(content)}; valid: a string", param=f"{place}.content")
    return {key: value for key, value in out.items() if key in MESSAGE}
