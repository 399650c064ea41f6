"""A conversation of several turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from experiments import cli
from experiments.commands.generate import (
    Opened,
    answered,
    check_drawing,
    drawing_arguments,
    headed,
    model_arguments,
    objects,
    opened,
    parsed,
    sampling_of,
    seed_of,
    template_arguments,
)
from lm.data.chat import Message, choose
from lm.decoding import Row, Sampling
from lm.errors import UserError, nearest
from lm.files import user_path, write_json

PROG = "python -m experiments.chat"
COMMANDS = {"/reset": "forgets the conversation", "/save": "FILE: writes it as JSON", "/quit": "ends (so does ctrl-d)"}
ASKS = "> "


def arguments(doc: str | None) -> cli.Parser:
    p = cli.Parser(PROG, doc)
    model_arguments(p)
    template_arguments(p)
    drawing_arguments(p)
    p.add_argument("--json", action="store_true", help="one JSON object per answer")
    return p


class Conversation:
    """The turns so far, and who answers them. `choices`: template, tools and documents."""

    def __init__(self, model: Opened, args: argparse.Namespace, sampling: Sampling, choices: dict[str, Any]) -> None:
        self.model, self.args, self.sampling, self.choices = model, args, sampling, choices
        self.turns: list[Message] = []
        self.reset()

    def reset(self) -> None:
        self.turns = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def say(self, text: str) -> None:
        """One turn of the user's and its answer, shown as it comes. A turn that cannot be answered is taken back, and
        the mistake raised."""
        turns = [*self.turns, {"role": "user", "content": text}]
        n = sum(turn["role"] == "user" for turn in self.turns)
        prompt = self.model.conversation(turns, "the conversation", **self.choices)
        row = Row(prompt, self.sampling, seed_of(self.args.seed, n), self.args.max_new_tokens)
        show = None if self.args.json else lambda fresh: print(fresh, end="", flush=True)
        made, _ = answered(self.model, row, self.args.stop, show)
        self.turns = [*turns, {"role": "assistant", "content": made["text"]}]
        print(json.dumps({"prompt": text, **made}, ensure_ascii=False) if self.args.json else "", flush=True)

    def save(self, place: str) -> None:
        """Writes the turns; `UserError` for a file that is there already or cannot be written."""
        if not place:
            raise UserError("/save: no file given; valid: /save FILE")
        path = user_path(place, "/save")
        if path.exists():
            raise UserError(f"/save: {path} exists already; valid: a new file")
        try:
            write_json(path, self.turns, indent=2, ascii_only=False)
        except OSError as e:
            raise UserError(f"/save: {path}: cannot be written ({e.strerror or e})") from None

    def obey(self, line: str) -> bool:
        """Does what a line that begins with a slash says; whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self.reset()
        elif name == "/save":
            self.save(rest.strip())
        else:
            about = ", ".join(f"{known} {what}" for known, what in COMMANDS.items())
            raise UserError(f"{name}: unknown command{nearest(name, COMMANDS)}; valid: {about}")
        return True


def lines(stdin: IO[str], terminal: bool) -> Iterator[str]:
    """What the user says, a line a turn, until the end."""
    if not terminal:
        try:
            for line in stdin:
                line.encode()
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeError:
            raise UserError("standard input is not UTF-8; valid: a line of UTF-8 text a turn") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (`input` edits lines and remembers them)

    while True:
        try:
            yield input(ASKS)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def run(argv: Sequence[str], doc: str | None = None, stdin: IO[str] | None = None) -> int:
    args, overrides = parsed(arguments(doc), argv)
    check_drawing(args)
    header, cfg = headed(args, overrides)
    if not header.text.templates:
        raise UserError(
            f"--checkpoint: {args.checkpoint} has no chat template; valid: a model tuned to converse, or "
            "experiments.generate, which continues any text"
        )
    choices = {
        "template": args.template,
        "tools": objects("--tools", args.tools),
        "documents": objects("--documents", args.documents),
    }
    choose(header.text.templates, args.template, args.tools is not None, args.checkpoint)
    sampling = sampling_of(args, header.text.generation)
    sampling.check(cfg.vocab_size)
    talk = Conversation(opened(args, header, cfg, ends=not args.ignore_eos), args, sampling, choices)
    source = stdin or sys.stdin
    terminal = source.isatty()
    if terminal:
        print(f"{', '.join(f'{name} {what}' for name, what in COMMANDS.items())}", file=sys.stderr)
    for line in lines(source, terminal):
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not talk.obey(line.strip()):
                    break
            else:
                talk.say(line)
        except KeyboardInterrupt:
            print("\ninterrupted; the turn is taken back", file=sys.stderr)
            if not terminal:
                return 130
        except UserError as e:
            if not terminal:  # nobody is there to say it in another way
                raise
            print(f"error: {e}", file=sys.stderr)
    return 0
