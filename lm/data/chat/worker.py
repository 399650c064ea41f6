"""Renders chat templates in a process of its own: ``python worker.py MIB SECONDS``, one JSON object a line.

A template is a program from a stranger. Jinja's sandbox keeps it away from Python, and this process bounds what it
computes: its time and memory are limited, and whoever waits for an answer kills it when none comes. It imports nothing
of this library, so that it starts at once.
"""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

LONGEST = 10 * 2**20  # characters of a conversation


class Refused(Exception):
    """A template's own ``raise_exception``."""


class _Answers(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: what the model itself said. Renders as if it was not there."""

    tags = {"generation"}  # noqa: RUF012  (how Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_answer"), [], [], inside).set_lineno(line)

    def _answer(self, caller: Callable[[], str]) -> str:
        text = caller()
        begins = self.environment.written  # type: ignore[attr-defined]
        self.environment.answers.append((begins, begins + len(text)))  # type: ignore[attr-defined]
        return text


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)``, closed for names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        for name in given:
            _public(name)
        jinja2.utils.Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}")


def _refuse(message: object) -> None:
    raise Refused(str(message))


def _json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The template in an environment as `transformers` gives it: blocks are trimmed, ``tojson`` neither escapes nor
    sorts, ``break`` and ``continue``, ``raise_exception``, ``strftime_now``, ``generation``."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, "jinja2.ext.loopcontrols"]
    )
    environment.extend(written=0, answers=[])
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
    return environment.from_string(template)


def render(template: str, words: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character ranges of what is marked as the model's own."""
    made = compiled(template)
    environment: Any = made.environment
    environment.written, environment.answers = 0, []
    pieces = []
    for piece in made.generate(**words):
        pieces.append(piece)
        environment.written += len(piece)
        if environment.written > LONGEST:
            raise MemoryError
    return "".join(pieces), list(environment.answers)


def answer(line: str) -> dict[str, Any]:
    """What one request gets: ``text`` and ``answers``, or ``refused`` or ``error``."""
    asked = json.loads(line)
    try:
        text, answers = render(asked["template"], asked["words"])
    except Refused as e:
        return {"refused": str(e)}
    except MemoryError:
        return {"error": f"it makes more than {LONGEST:,} characters, or needs more memory than is allowed"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except jinja2.TemplateSyntaxError as e:
        return {"error": f"line {e.lineno}: {e.message}"}
    except Exception as e:  # whatever its expressions end in
        return {"error": f"{type(e).__name__}: {e}"}
    return {"text": text, "answers": answers}


def main(mib: int, seconds: float) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
    except (ImportError, ValueError, OSError):  # not on this system: the time stays bounded
        pass
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # computing for longer ends this process
        said = json.dumps(answer(line))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(said, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
