"""Every command of Decoder Lab under one name.

``lab COMMAND [...]`` is ``python -m experiments.COMMAND [...]``; ``lab COMMAND --help`` says what one takes, and
``lab completion bash|zsh|fish`` prints what a shell needs to complete commands, their arguments and config files.
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.commands import completion
from lm.errors import UserError, unknown

# The one table of commands: where each declares its arguments, as FILE or FILE:FUNCTION below this folder.
GENERATE = "commands/generate.py"
CHECKPOINT = ("commands/source.py:add", "commands/source.py:add_dtype")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("running/command.py",),
    "sweep": ("sweeps/command.py",),
    "report": ("reports/command.py",),
    "list": ("commands/listing.py",),
    "generate": (GENERATE, *CHECKPOINT),
    "chat": (
        "commands/chat.py",
        *(f"{GENERATE}:{part}_arguments" for part in ("model", "drawing", "template")),
        *CHECKPOINT,
    ),
    "serve": ("serving/command.py", f"{GENERATE}:model_arguments", *CHECKPOINT),
    "evaluate": ("commands/evaluate.py", *CHECKPOINT),
    "convert": ("commands/convert.py", CHECKPOINT[0]),
    "compile": ("certificates/command.py",),
    "new_method": ("commands/new_method.py",),
    "results_page": ("reports/page.py",),
    "certificates": ("certificates/kept.py",),
}
HERE = Path(__file__).parent
REPOSITORY = HERE.parent / "configs" / "bases"  # no wheel has it
THERE = ("new_method", "results_page", "certificates")  # what they write is part of the repository


def about(name: str) -> str:
    """The first sentence of a command's help; nothing of the command is imported."""
    file = HERE / f"{name}.py" if (HERE / f"{name}.py").is_file() else HERE / name / "__main__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).replace("``", "")
    sentence = sentence.removeprefix(f"python -m experiments.{name}: ")
    return sentence[:1].upper() + sentence[1:]


def overview() -> str:
    """What ``lab --help`` prints."""
    rows = cli.aligned([("command", "what it does"), *((name, about(name)) for name in COMMANDS)], indent="  ")
    return f"{(__doc__ or '').strip()}\n\n{rows}"


def script(args: Sequence[str]) -> str:
    """What ``lab completion SHELL`` prints."""
    if len(args) != 1 or args[0] not in completion.SHELLS:
        found = " ".join(args) or "nothing"
        raise UserError(f"lab completion: found {found}; valid: {', '.join(completion.SHELLS)}")
    table = {name: completion.flags(HERE, COMMANDS[name]) for name in COMMANDS}
    return completion.SHELLS[args[0]](table, {name: about(name) for name in COMMANDS})


def run(argv: Sequence[str]) -> int:
    """Does what the first word says; a command's own module does the rest, as ``python -m`` would run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = argv
    if name == "completion":
        print(script(rest))
        return 0
    if name not in COMMANDS:
        raise unknown("lab", name, (*COMMANDS, "completion"))
    if name in THERE and not REPOSITORY.is_dir():
        raise UserError(f"lab {name}: writes into the repository; valid: in a checkout, installed by pip install -e .")
    sys.argv = [f"lab {name}", *rest]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
