"""A conversation as the text that a model was tuned on: its checkpoint's own Jinja template, rendered in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import UserError


def render(template: str | None, messages: Sequence[Mapping[str, str]], source: str, **words: Any) -> str:
    """The text up to where the model answers. `messages`: ``{"role": "system" | "user" | "assistant", "content": …}``;
    `words`: ``bos_token``, ``eos_token`` and whatever else the template asks for.

    Raises `UserError` when `source` has no template, or one that refuses the messages.
    """
    if not template:
        raise UserError(f"--chat: {source} has no chat template; valid: without --chat, or a model tuned to converse")
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise UserError(f"--chat: the template of {source} refuses the conversation: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        made = environment.from_string(template).render(messages=messages, **{"add_generation_prompt": True, **words})
    except TemplateError as e:
        raise UserError(f"--chat: the template of {source} cannot be rendered ({e})") from None
    return made
