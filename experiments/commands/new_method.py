"""The files of a new method: plug, row, config and tests, with what is left to write marked in each."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from experiments.commands.new_method_texts import CONFIG, PLUG, TEST, TRAIN
from experiments.spec import registry
from lm.errors import UserError, shown, unknown
from lm.files import write_text
from lm.plug import table

PROG = "python -m experiments.new_method"
HOLE = "raise NotImplementedError"


@dataclass(frozen=True)
class Socket:
    """Where a socket's plugs live: `package` with its table and ``base.py``, the class `base` that they inherit.

    `arm` is how an experiment's arm names the plug, a Python expression with ``{name}`` in it; `case` the generic suite
    of ``tests/cases`` and `declares` what a class of it declares; `asks`: the methods to write, empty = those that the
    base leaves open.
    """

    package: str
    base: str
    arm: str
    case: str = ""
    declares: str = ""
    asks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return registry.ROOT.joinpath(*self.package.split("."))


def _model(key: str, package: str, base: str, asks: tuple[str, ...] = ()) -> Socket:
    """A socket of the model whose plugs run in `PlugCase`."""
    declares = '    change = {{"KEY": {{"name": "{name}"}}}}\n    limits = ()'.replace("KEY", key)
    arm = '{{"model.KEY.name": "{name}"}}'.replace("KEY", key)
    return Socket(package, base, arm, "PlugCase", declares, asks)


SOCKETS = {
    "pattern": _model("pattern", "lm.patterns", "Pattern"),
    "positions": _model("positions", "lm.positions", "Positions", ("rotate", "move")),
    "ffn": _model("ffn", "lm.ffn", "FFN"),
    "head": _model("head", "lm.heads", "Head"),
    "mixer": Socket(
        "lm.mixers",
        "Mixer",
        '{{"model.mixer.name": "{name}"}}',
        "MixerCase",
        '    change = {{"mixer": {{"name": "{name}"}}}}',
    ),
    "cache": Socket(
        "lm.caches", "Cache", '{{"model.cache.name": "{name}"}}', "CacheCase", "    plug = {cls}()", ("init",)
    ),
    "objective": Socket(
        "lm.objectives", "Objective", '{{"train.objective.name": "{name}"}}', "ObjectiveCase", "    objective = {cls}()"
    ),
    "optimizer": Socket("lm.optimizers", "Optimizer", '{{"train.optimizer.name": "{name}"}}'),
    "surgery": Socket("lm.surgery", "Surgery", '{{"surgery": ("{name}",)}}', "SurgeryCase", "", ("apply",)),
    "measure": Socket("lm.measures", "Measure", "{{}}"),
}


def class_name(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def files(name: str, socket: Socket) -> dict[str, Path]:
    tests = registry.ROOT.joinpath("tests", *socket.package.split(".")[1:])
    return {
        "plug": socket.folder / f"{name}.py",
        "row": socket.folder / "__init__.py",
        "config": registry.CONFIGS / f"{name}.py",
        "test": tests / f"test_{name}.py",
    }


def holes(socket: Socket) -> tuple[list[str], list[str]]:
    """``(imports, methods)`` of a plug's file: the methods that it has to write, as the base class declares them."""
    module = importlib.import_module(f"{socket.package}.base")
    tree = ast.parse(inspect.getsource(module))
    base = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == socket.base)
    methods = [n for n in base.body if isinstance(n, ast.FunctionDef)]
    asked = [m for m in methods if (m.name in socket.asks if socket.asks else ast.unparse(m.body[-1]).startswith(HOLE))]
    out, used = [], set()
    for method in asked:
        notes = [a.annotation for a in method.args.args] + [method.returns]
        used |= {n.id for note in notes if note is not None for n in ast.walk(note) if isinstance(n, ast.Name)}
        defaults = [n for d in method.args.defaults for n in ast.walk(d)]
        used |= {n.id for n in defaults if isinstance(n, ast.Name)}
        doc = ast.get_docstring(method) or ""
        hole = f'{HOLE}("{{place}}: write {method.name}")'
        method.body = [ast.parse(hole).body[0]]
        out.append(_method(method, doc))
    imports, own = [], sorted({socket.base} | {n for n in used if n in vars(module) and _is_own(tree, n)})
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not ast.unparse(node).startswith("from __future__"):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
            imports += [ast.unparse(node)] if node.names else []
    return [*imports, f"from {socket.package}.base import {', '.join(own)}"], out


def _is_own(tree: ast.Module, name: str) -> bool:
    """Whether the module defines `name` itself."""
    assigned = (t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name))
    return name in {n.name for n in tree.body if isinstance(n, ast.ClassDef)} | set(assigned)


def _method(method: ast.FunctionDef, doc: str) -> str:
    head, _, hole = ast.unparse(method).rpartition("\n")
    lines = textwrap.wrap(doc, 110)
    text = '"""' + "\n    ".join(lines) + '"""'
    return textwrap.indent(f"{head}\n    {text}\n{hole}", "    ")


def insert_row(text: str, name: str, place: str) -> str:
    """The source of a socket's ``__init__.py`` with another row at the end of its table."""
    found = re.search(r"TABLE = Table\((.*?)\n?\)\n", text, re.DOTALL)
    if found is None:
        raise UserError(f"{place}: has no table of places; valid: a socket whose TABLE is in its __init__.py")
    rows = found.group(1).strip().removeprefix("{").removesuffix("}").strip().rstrip(",")
    listed = [row.strip() for row in rows.split(",")] + [f'"{name}": "{place}"']
    body = "".join(f"        {row},\n" for row in listed)
    return text[: found.start()] + "TABLE = Table(\n    {\n" + body + "    }\n)\n" + text[found.end() :]


def written(name: str, socket_name: str, arxiv: str) -> dict[Path, str]:
    """What every file is to hold. Raises `UserError` for names that are taken and files that exist."""
    socket = SOCKETS[socket_name]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"NAME: found {shown(name)}; valid: lower-case letters, digits and _, a letter first")
    if name in table(socket.package):
        raise UserError(f"NAME: {socket.package} has {name!r} already; valid: a new name")
    places = files(name, socket)
    for what in ("plug", "config", "test"):
        if places[what].exists():
            raise UserError(f"{places[what].relative_to(registry.ROOT)}: exists already; valid: a new name")
    cls, imports, methods = class_name(name), *holes(socket)
    trains = socket.arm.startswith('{{"train.')
    words = {
        "name": name,
        "cls": cls,
        "socket": socket_name,
        "base": socket.base,
        "module": f"{socket.package}.{name}",
        "arxiv": arxiv or "XXXX.XXXXX",
        "imports": "\n".join(imports),
        "case": socket.case,
    }
    named = {what: path.relative_to(registry.ROOT).as_posix() for what, path in places.items()}
    plug = PLUG.format(**words, methods="\n\n".join(methods).replace("{place}", named["plug"]))
    suite = ""
    if socket.case:
        declares = socket.declares.format(**words) or "    change = {}"
        suite = TEST["suite"].format(**words, declares=declares, place=named["test"])
    own = "{cls}()" in socket.declares
    test = TEST["head"].format(
        **words,
        case_import=f"from cases.{_case_file(socket.case)} import {socket.case}\n" if socket.case else "",
        plug_import=f"\nfrom {words['module']} import {cls}\n" if own else "",
    )
    test += suite + TEST["oracle"].format(**words, place=named["test"])
    config = CONFIG.format(
        **words,
        arm=socket.arm.format(**words),
        train=TRAIN if trains else "",
        measure=f'{{"name": "{name}"}}' if socket_name == "measure" else _measure(trains),
        place=named["config"],
        metric="training/nll" if trains else "nll/nll_inside",
        label="training" if trains else "nll",
    )
    row = insert_row(places["row"].read_text(encoding="utf-8"), name, f"{words['module']}:{cls}")
    return {places["plug"]: plug, places["row"]: row, places["config"]: config, places["test"]: test}


def _case_file(case: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", case).lower()


def _measure(trains: bool) -> str:
    if trains:
        return '{"name": "train_log"}'
    return '{"name": "nll_by_position", "texts": ("python-docs",), "tokens": 64, "bin": 32}'


def run(argv: Sequence[str], doc: str | None = None) -> int:
    parser = cli.Parser(PROG, doc)
    parser.add_argument("name", metavar="NAME", help="the method's name in configs: lower-case letters, digits and _")
    parser.add_argument("--socket", required=True, help=", ".join(SOCKETS))
    parser.add_argument("--arxiv", default="", help="the paper's id, for example 2309.17453")
    args, rest = parser.parse_known_args(list(argv))
    parser.refuse(rest)
    if args.socket not in SOCKETS:
        raise unknown("--socket", args.socket, SOCKETS)
    made = written(args.name, args.socket, args.arxiv)
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    if importlib.util.find_spec("ruff") is not None:
        names = [str(path) for path in made]
        for command in (["check", "-q", "--fix", "--select=I,F401"], ["format", "-q"]):
            subprocess.run([sys.executable, "-m", "ruff", *command, *names], check=False, cwd=registry.ROOT)
    print("written; what is left to write raises or fails, and says so:")
    for path, text in made.items():
        n = text.count("NotImplementedError") + text.count("pytest.fail")
        print(f"  {path.relative_to(registry.ROOT)}: {'one row' if path.name == '__init__.py' else f'{n} to fill'}")
    print("then: make check")
    return 0
