"""A conversation as the text that a model was tuned on: its checkpoint's own Jinja template."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError, cut, unknown

__all__ = ["Message", "Rendered", "choose", "render"]

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | …, "content": …}
SECONDS = 2.0  # of computing; a conversation takes milliseconds
PATIENCE = 30.0  # seconds until an answer, on a machine that does much else meanwhile
MIB = 1024
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's thoughts go by


@dataclass(frozen=True)
class Rendered:
    """`answers`: character ranges of `text` that a template marks by ``{% generation %}`` as the model's own words;
    empty for a template that marks nothing."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


def choose(templates: Mapping[str, str], name: str | None, tools: bool, source: str) -> str:
    """The template called `name`; without a name ``tool_use`` where there are tools and such a one, else ``default``.

    Raises `UserError` when `source` has no template, or none of that name.
    """
    if not templates:
        raise UserError(f"--chat: {source} has no chat template; valid: without --chat, or a model tuned to converse")
    if name is None:
        name = "tool_use" if tools and "tool_use" in templates else "default"
        if name not in templates and len(templates) == 1:
            (name,) = templates
    if name not in templates:
        raise unknown(f"--template: {source}", name, templates)
    return templates[name]


def render(
    template: str,
    messages: Sequence[Message],
    source: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **words: Any,
) -> Rendered:
    """The text that `template` makes of `messages`; with `add_generation_prompt` up to where the model answers.

    `words`: ``bos_token`` and whatever else the template asks for. Keys of a message that hold None are left out.
    Raises `UserError` naming `source` for a template that refuses the messages, is wrong, takes longer than `SECONDS`
    or makes more than the process of `lm.data.chat.worker` may.
    """
    given = {
        "messages": [_aliased(message) for message in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
        **words,
    }
    try:
        line = json.dumps({"template": template, "words": given})
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"--chat: the conversation is not made of text, numbers, lists and objects ({e})") from None
    made = _WORKER.ask(line)
    if "refused" in made:
        raise UserError(f"--chat: the template of {source} refuses the conversation: {cut(made['refused'])}")
    if "error" in made:
        raise UserError(f"--chat: the template of {source} cannot be rendered ({cut(made['error'])})")
    try:
        made["text"].encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"--chat: the template of {source} cannot be rendered (character {e.start} is half of a surrogate pair)"
        ) from None
    return Rendered(made["text"], tuple((a, b) for a, b in made["answers"]))


def _aliased(message: Message) -> dict[str, Any]:
    """A message without its empty keys; thoughts under the two names that templates read."""
    out = {key: value for key, value in message.items() if value is not None}
    thoughts = next((out[key] for key in REASONING if key in out), None)
    return out if thoughts is None else {"thinking": thoughts, **out, "reasoning_content": thoughts}


class _Worker:
    """The process that renders; started with the first question, and again after one that it did not survive."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0  # a forked process needs another
        self.lock = threading.Lock()

    def ask(self, line: str) -> dict[str, Any]:
        with self.lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except OSError:
                self.end()
                return {"error": "the process that renders it has ended"}
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                self.end()
                return {"error": f"it takes longer than {PATIENCE:g} s"}
            answer = process.stdout.readline()
            if not answer:
                slow = process.wait() == -signal.SIGVTALRM
                self.end()
                return {"error": f"it takes longer than {SECONDS:g} s" if slow else f"it needs more than {MIB} MiB"}
            return dict(json.loads(answer))

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.owner = os.getpid()
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("worker.py")), str(MIB), str(SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        return self.process

    def end(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process = None


_WORKER = _Worker()
atexit.register(_WORKER.end)
