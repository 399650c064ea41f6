"""Malformed configs and command lines by seed: every key with any kind of value, every flag with any kind of word."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sandbox
from cases import tiny_llama

from experiments.commands.listing import SOCKETS
from lm.config import ModelConfig
from lm.plug import table
from lm.train.config import TrainConfig


@dataclass(frozen=True)
class Case:
    """One command: `files` are written first, below the sandbox; `refuse`: it must not pass."""

    command: str
    argv: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    refuse: bool = False
    more: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = " ".join(repr(a if len(a) < 200 else f"{a[:80]}…({len(a)})") for a in self.argv)
        files = "".join(f" <{n}: {t[:300]!r}>" for n, t in self.files.items())
        return f"{self.command} {said}{files}{self.more or ''}"


LONG = "x" * 5_000
PLACES = [
    "",
    " ",
    ".",
    "/proc",
    "~",
    "~nosuchuser/x",
    "~nosuchuser",
    "nowhere",
    "nowhere/below",
    "/dev/null",
    "/dev/zero",
    LONG,
    "x" * 300,
    "a/" * 3000,
    "odd/fifo",
    "odd/loop",
    "odd/loop/below",
    "odd/dangling",
    "odd/folder",
    "odd/empty",
    "odd/latin1",
    "odd/nul",
    "texts",
    "texts/a.txt",
    "texts/a.txt/below",
    "model",
    "done",
    "toy.py",
    "config.json",
    "config.json:smoke",
    "toy.py:",
    "toy.py:nowhere",
    ":",
    "hf:",
    "hf:/",
    "\udcff\udcfe",
    "\ud800",
    "café",
    "\U0001f600",
    "*",
    "**",
    "[",
    "-",
    "--",
    "odd/deep.json",
    "odd/deeper.json",
    "odd/digits.json",
    "odd/digits-in.json",
    "odd/nan.json",
    "odd/list.json",
    "odd/text.json",
    "odd/half.json",
    "odd/mark.json",
    "odd/latin1.json",
    "odd/cut.json",
    "odd/twice.json",
    "odd/latin1.jinja",
    "odd",
    "model + nowhere",
    "model + model",
    " + ",
    "model + ~nosuchuser",
    "a\nb",
    "a\tb",
    "$x$",
    "%s{}",
    "<b>|`",
]
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-nan",
    "1e999",
    "-1e999",
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "1.5",
    "1e3",
    "1e-320",
    "-1e-9",
    "1000000000000",
    "1000000000001",
    "99999999999999999999",
    "1" + "0" * 400,
    "9" * 5_000,
    "-" + "9" * 5_000,
    "0x10",
    "1_000",
    " 3",
    "3 ",
    "--5",
    "+5",
    "1j",
    "٣",
    "1e400",
    "2147483647",
    "999999937",
    "2147483648",
    "4294967296",
    "18446744073709551616",
    "-2147483649",
]
WORDS = [
    "None",
    "True",
    "False",
    "'x'",
    "()",
    "[]",
    "{}",
    "(1,)",
    "(nan,)",
    "(1e999,)",
    "(-1e999,)",
    "[[],[]]",
    "{1:2}",
    "{'name':'x'}",
    "{'name':[]}",
    "{'name':None}",
    "{'a':{}}",
    "({},)",
    "({'layers':[]},)",
    "({'layers':'0:9999999999999','d_ff':8},)",
    "({'layers':'0','d_ff':1e999},)",
    "{1}",
    "b'x'",
    "...",
    "1+1",
    "lambda: 0",
    "(" * 300,
    "-" * 3000 + "1",
    "[" * 90 + "]" * 90,
    "('a','b')",
    "('a',1)",
    "((1,),)",
    "x.y",
    "name",
    "causal",
    "random",
    "..",
    "../../x",
    "a/b",
    "a b",
    "__class__",
    "{'x': float}",
    "'\\ud800'",
    "'" + "y" * 5_000 + "'",
    "zero",
    "nll",
    "tensor",
    "{'batch': [[]]}",
    "{'batch': 3}",
    "{'batch': 'tensor'}",
    "{3: 4}",
    "{'batch': {'a': 1}}",
    "('zero',)",
    "([],)",
    "[{}]",
    "(None,)",
    "((),)",
]
ANY = [*PLACES, *NUMBERS, *WORDS]
# What may stand for a value of JSON.
JSON: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    10**12,
    10**12 + 1,
    10**30,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "x",
    "nan",
    "../../x",
    "/",
    "~nosuchuser",
    LONG,
    "\ud800",
    "\x00",
    "a\nb",
    "$x$ | `<b>",
    [],
    [[]],
    [None],
    [1, "a"],
    {},
    {"a": {}},
    {"name": []},
    {"name": "x"},
    {"": 1},
    {"a.b": 1},
    {"a..b": 1},
    [{}],
    [float("nan")],
    "é" * 300,
    [0] * 1000,
    "model",
    "texts",
    "odd/fifo",
    "odd/loop",
    {"x" * 300: 1},
    "{% x %}",
    [["a"]],
    {"x": {"y": {"z": []}}},
]


NEVER = ("nan", "inf", "-inf", "-nan", "1e999", "-1e999", "1e400", "9" * 5_000, "1" + "0" * 400, "--5", "1j", "")


def _fields(cls: type, key: str, setup: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(dotted key, type, overrides that must come first) of every field of a dataclass and of its plugs."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        place, socket = f"{key}.{f.name}", f.metadata.get("socket")
        yield place, hints[f.name], setup
        if socket and len(setup) < 2:  # some plugs hold plugs of their own socket
            for name, plug in table(socket).items():
                yield from _fields(plug, place, (*setup, f"--config.{place}={name}"))
        elif not socket and dataclasses.is_dataclass(hints[f.name]) and isinstance(hints[f.name], type):
            yield from _fields(hints[f.name], place, setup)


def keys() -> list[tuple[str, Any, tuple[str, ...]]]:
    """Every key that a config has."""
    out = [*_fields(ModelConfig, "model"), *_fields(TrainConfig, "train")]
    for name, plug in table(SOCKETS["measures"]).items():
        out += list(_fields(plug, "measures.own", (f"--config.measures.own={name}",)))
    out += [
        (k, Any, ())
        for k in ("name", "checkpoint", "adapter", "architecture", "seeds", "baseline", "paper.title", "scale")
    ]
    return out


def _broken(tree: Any, rng: random.Random, values: Sequence[Any]) -> Any:
    """The tree with one node replaced, dropped, renamed or nested into itself."""
    tree = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for at in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, at))
            walk(node[at])

    walk(tree)
    node, at = rng.choice(nodes)
    how = rng.random()
    if how < 0.08:
        del node[at]
    elif how < 0.16 and isinstance(node, dict):
        node[rng.choice(["", " ", "x", "\ud800", "a.b", "../x", "$x$", LONG, "é|`<b>", "a b"])] = node.pop(at)
    elif how < 0.24:
        other = rng.choice(nodes)
        node[at] = copy.deepcopy(other[0][other[1]])
    elif how < 0.28:
        for _ in range(200):
            node[at] = [node[at]]
    else:
        node[at] = rng.choice(values)
    return tree


def overrides(rng: random.Random, known: Sequence[tuple[str, Any, tuple[str, ...]]]) -> Case:
    """A key of the config, or something like one, with any value."""
    place, hint, setup = rng.choice(known)
    how = rng.random()
    if how < 0.08:
        place = rng.choice(
            [
                place + ".x",
                place[:-1],
                place.replace(".", ".."),
                place.upper(),
                "arms.zero." + place,
                "arms.nowhere." + place,
                "x" * 3000,
                "arms.zero",
                "model",
                "",
                ".",
                "arms.zero.only",
                "arms.zero.surgery",
                "arms.zero.starts_from",
                "arms.zero.trains",
            ]
        )
    elif how < 0.16 and place.split(".")[0] in ("model", "train", "measures"):
        setup = tuple(
            s.replace("--config.", "--config.arms.window.", 1) for s in setup if "measures.own" not in s
        ) + tuple(s for s in setup if "measures.own=" in s)
        place = "arms.window." + place
    value = rng.choice(ANY if rng.random() < 0.5 else NUMBERS if hint in (int, float) else WORDS)
    head = "run" if rng.random() < 0.85 else "sweep"
    refuse = hint in (int, float) and value in NEVER
    return Case(head, ("--config=toy.py", "--dry-run", *setup, f"--config.{place}={value}"), refuse=refuse)


def settings(rng: random.Random, known: object) -> Case:
    """A config.json with something wrong in it."""
    whole = {"schema": 1, "file": "SANDBOX/toy.py", "config": sandbox.SETTINGS}
    made = _broken(whole, rng, JSON)
    if rng.random() < 0.2:
        made = _broken(made, rng, JSON)
    return Case("run", ("--config=broken.json", "--dry-run"), {"broken.json": json.dumps(made)})


PIECES = [
    "c['arms']['zero'] = {'only': [[]]}",
    "c['arms']['zero'] = {'only': {'nll'}}",
    "c['arms']['zero'] = {'surgery': {1: 2}}",
    "c['arms']['zero'] = {'surgery': [[]]}",
    "c['arms']['zero'] = {'surgery': ({'name': []},)}",
    "c['arms']['zero'] = {'starts_from': []}",
    "c['arms']['zero'] = {'starts_from': {}}",
    "c['arms']['zero'] = {1: 2}",
    "c['arms'] = {1: {}}",
    "c['arms'] = [{}]",
    "c['arms'] = None",
    "c['arms']['zero'] = {'model.pattern': lambda: 0}",
    "c['arms']['zero'] = {'model.pattern': [1]}",
    "c['arms']['zero'] = {'model.layer_overrides': 3}",
    "c['arms']['zero'] = {'model.layer_overrides': ({'layers': 10**20},)}",
    "c['arms']['zero'] = {'model.layer_overrides': ({'layers': '0', 'pattern': []},)}",
    "c['arms']['zero'] = {'model.layer_overrides': ({'layers': '0', 3: []},)}",
    "c['measures']['nll']['texts'] = (3,)",
    "c['measures']['nll']['texts'] = ([],)",
    "c['measures']['nll'] = object()",
    "c['measures'] = []",
    "c['measures']['nll']['name'] = {}",
    "c['train']['mesh'] = {'rules': {'batch': [[]]}}",
    "c['train']['mesh'] = {'rules': {3: 'tensor'}}",
    "c['train']['mesh'] = {'rules': {'batch': 3}}",
    "c['train']['mesh'] = {'rules': {'batch': {'tensor'}}}",
    "c['train']['models'] = {'a': []}",
    "c['train']['models'] = {3: 'x'}",
    "c['train']['profile'] = ('a', 'b')",
    "c['seeds'] = (10**30,)",
    "c['seeds'] = (2**63,)",
    "c['seeds'] = range(3)",
    "c['seeds'] = (1.0,)",
    "c['seeds'] = {0}",
    "c['paper']['numbers'] = {'a': object()}",
    "c['paper']['numbers'] = {1: float('nan')}",
    "c['paper'] = {'title': 'x\\ny'}",
    "loop = {}; loop['loop'] = loop; c['paper']['numbers'] = loop",
    "loop = []; loop.append(loop); c['seeds'] = loop",
    "loop = {}; loop['loop'] = loop; c['model'] = loop",
    "c['name'] = '../../x'",
    "c['name'] = '/x'",
    "c['name'] = 'a' * 400",
    "c['name'] = '\\ud800'",
    "c['name'] = '..'",
    "c['name'] = 'a\\nb'",
    "c['scale'] = '../x'",
    "c['baseline'] = []",
    "c['model']['d_model'] = 10**12",
    "c['model']['n_layers'] = 10**12",
    "c['model']['n_heads'] = 10**12",
    "c['model']['n_heads'] = 10**12; c['model']['n_kv_heads'] = 7",
    "c['train']['batch'] = 10**12; c['train']['accumulate'] = 7",
    "c['model']['vocab_size'] = 10**13",
    "c['model']['max_positions'] = 10**18",
    "c['train']['steps'] = 10**18",
    "c['train']['data']['seq_len'] = 10**15",
    "c['train']['mesh'] = {'tensor': 10**12}",
    "import sys; sys.exit(3)",
    "raise SystemExit('no')",
    "raise RecursionError",
    "raise MemoryError",
    "raise OSError(2, 'x' * 900)",
    "raise ValueError('a\\nb\\ud800' * 300)",
    "c = None",
    "c = {}",
    "c = 3",
    "f = lambda: f(); f()",
    "c['train']['data']['texts'] = ('odd/fifo',)",
    "c['measures']['nll']['texts'] = ('odd/fifo',)",
    "c['train']['data']['tokenizer'] = 'odd/fifo'",
    "c['train']['data']['tokenizer'] = 'bpe:99999999999'",
    "c['train']['data']['tokenizer'] = 'bpe:-1'",
    "c['train']['data']['tokenizer'] = 'bpe:x'",
    "c['train']['data']['tokenizer'] = 'bpe:400'",
    "c['train']['data']['kind'] = 'chat'",
]
TOPS = [
    "SCALES = 3",
    "SCALES = ()",
    "SCALES = None",
    "SCALES = ('laptop', 3)",
    "get_config = 3",
    "claims = None",
    "raise SystemExit",
    "import nowhere",
    "def sweep_windows():\n    yield []",
    "def sweep_windows():\n    yield {1: 2}",
    "def sweep_windows():\n    while True: yield {}",
    "sweep_windows = 3",
    "def sweep_windows():\n    yield {'seeds': object()}",
    "def sweep_windows():\n    raise SystemExit(3)",
    "def sweep_windows():\n    yield {'seeds': (10**30,)}",
    "def sweep_windows():\n    yield {'model.d_ff': float('nan')}",
    "def sweep_windows():\n    yield {'name': '../x'}",
    "def sweep_windows():\n    yield {'x' * 900: 'y' * 900}",
    "(" * 300,
    "\x00",
    "\ud800",
]


def programs(rng: random.Random, known: object) -> Case:
    """A config file that does something odd."""
    source = sandbox.CONFIG
    refuse = False
    if rng.random() < 0.75:
        source = source.replace("    return c", f"    {rng.choice(PIECES)}\n    return c")
    else:
        source += f"\n{rng.choice(TOPS)}\n"
    command = rng.choice(("run", "run", "sweep"))
    return Case(command, ("--config=odd.py", "--dry-run"), {"odd.py": source}, refuse)


def report(rng: random.Random, known: object) -> Case:
    """Results and sweeps that somebody has edited."""
    if rng.random() < 0.6:
        made = _broken(sandbox.RESULTS, rng, JSON)
        return Case("report", ("edited",), {"edited/results.json": json.dumps(made)})
    made = _broken(sandbox.SWEEP, rng, [*JSON, "((", "[1", "{'a': [", "(" * 300])
    return Case("report", ("edited",), {"edited/sweep.json": json.dumps(made)})


Flags = dict[str, Sequence[str]]
_MODEL: Flags = {
    "--checkpoint": PLACES,
    "--adapter": PLACES,
    "--mesh": [
        *ANY,
        "fsdp=--5",
        "fsdp=-1,data=-1",
        "data=0",
        "fsdp=",
        "=1",
        "data=1,data=1",
        "data=²",
        "data=" + "9" * 5000,
    ],
    "--dtype": ANY,
    "--pattern": ANY,
    "--cache": ANY,
    "--surgery": ANY,
    "--model.d_ff": ANY,
    "--model.pattern": ANY,
    "--model.positions.theta": ANY,
    "--model": ANY,
    "--model.": ANY,
}
_DRAWING: Flags = {
    f"--{name}": ANY
    for name in (
        "max-new-tokens seed temperature top-k top-p min-p typical-p repetition-penalty presence-penalty "
        "frequency-penalty"
    ).split()
} | {
    "--bias": [*ANY, "1:nan", "1:inf", "-1:1", "1:", ":1", "99999999999999:1", "1:-inf"],
    "--stop": ANY,
    "--ignore-eos": [""],
}
_CHAT: Flags = {"--system": ANY, "--template": ANY, "--tools": PLACES, "--documents": PLACES}
COMMANDS: dict[str, tuple[list[str], Flags]] = {
    "run": (
        ["--config=toy.py", "--dry-run"],
        {
            "--config": PLACES,
            "--workdir": PLACES,
            "--arms": ANY,
            "--fresh": [""],
            "--coordinator": [*ANY, "localhost:1"],
            "--processes": ANY,
            "--process": ANY,
            "--heartbeat": ANY,
        },
    ),
    "sweep": (
        ["--config=toy.py", "--dry-run"],
        {
            "--config": PLACES,
            "--sweep": ANY,
            "--engine": ANY,
            "--parallel": ANY,
            "--workdir": PLACES,
            "--arms": ANY,
            "--slurm": ANY,
            "--search": [*ANY, "optuna", "optuna:x"],
            "--trials": ANY,
            "--minimise": ANY,
            "--maximise": ANY,
            "--search-seed": ANY,
            "--storage": PLACES,
        },
    ),
    "report": (["done"], {"": PLACES, "--out": PLACES}),
    "list": ([], {"--configs": PLACES, "--plugs": ANY, "--json": [""]}),
    "generate": (
        ["--checkpoint=model", "--prompt=hi"],
        {
            **_MODEL,
            **_DRAWING,
            **_CHAT,
            "--prompt": ANY,
            "--file": PLACES,
            "--whole": [""],
            "--chat": [""],
            "--samples": ANY,
            "--json": [""],
        },
    ),
    "chat": (["--checkpoint=model"], {**_MODEL, **_DRAWING, **_CHAT, "--json": [""]}),
    "serve": (
        ["--checkpoint=model"],
        {
            **_MODEL,
            "--template": ANY,
            "--host": ANY,
            "--port": NUMBERS,
            "--model-name": ANY,
            "--max-length": ANY,
            "--max-new-tokens": ANY,
            "--max-batch": ANY,
            "--max-wait-ms": ANY,
            "--max-queue": ANY,
            "--max-body": ANY,
        },
    ),
    "evaluate": (
        ["--checkpoint=model", "--tasks=arc_easy"],
        {
            **_MODEL,
            "--tasks": ANY,
            "--include": PLACES,
            "--limit": ANY,
            "--shots": ANY,
            "--batch-size": ANY,
            "--max-length": ANY,
            "--chat": [""],
            "--out": PLACES,
        },
    ),
    "convert": (
        ["--checkpoint=model", "--to=new"],
        {
            "--checkpoint": PLACES,
            "--adapter": PLACES,
            "--mesh": _MODEL["--mesh"],
            "--to": PLACES,
            "--family": ANY,
            "--as": [*ANY, "run", "peft"],
            "--dtype": ANY,
            "--max-shard-size": [*ANY, "1KB", "0GB", "-1GB", "nanGB", "1e999GB", "infGB", "9" * 400 + "GB"],
        },
    ),
    "compile": (
        ["--config=toy.py", "--topology=v5e:2x2", "--estimate"],
        {
            "--config": PLACES,
            "--base": ANY,
            "--topology": [
                *ANY,
                "v5e:0x4",
                "v5e:2x2x2",
                "v4:0x0x0",
                "0xv5e:2x2",
                "9" * 30 + "xv5e:2x2",
                "v5e:" + "9" * 30 + "x1",
                "v5e:1x1",
                "v5e:²x2",
                "v5e:3x5",
            ],
            "--step": [*ANY, "decode", "prefill", "train"],
            "--arm": ANY,
            "--batch": ANY,
            "--length": ANY,
            "--quantize": [*ANY, "int8"],
            "--weights": [*ANY, "float32"],
            "--mesh": _MODEL["--mesh"],
            "--out": PLACES,
            "--search": [""],
            "--tries": ANY,
            "--estimate": [""],
            "--missing": [""],
            "--only": ANY,
        },
    ),
    "new_method": (["--socket=nowhere", "x"], {"": ANY, "--socket": ANY, "--arxiv": ANY}),
    "results_page": (["--check", "--root=."], {"--root": PLACES}),
    "lab": (["run", "--config=toy.py:x", "--dry-run"], {"": ["", "runn", "--x", "completion", LONG, "\udcff"]}),
}


def lines(rng: random.Random, known: object) -> Case:
    """A command line with one or two words that are wrong, missing, twice or of another command."""
    command = rng.choice(list(COMMANDS))
    argv, flags = COMMANDS[command]
    argv = list(argv)
    for _ in range(1 if rng.random() < 0.7 else 2):
        how = rng.random()
        flag = rng.choice(list(flags))
        if how < 0.05 and argv:
            argv.pop(rng.randrange(len(argv)))
        elif how < 0.1:
            other = rng.choice(list(COMMANDS))
            word = rng.choice(list(COMMANDS[other][1])) or "word"
            argv.append(f"{word}={rng.choice(ANY)}")
        else:
            value = rng.choice(flags[flag])
            argv = [w for w in argv if not (flag and w.startswith(flag + "=")) and (flag or w.startswith("-"))]
            argv.append(f"{flag}={value}" if flag and (value or rng.random() < 0.5) else flag or value)
    return Case(command, tuple(argv))


TEMPLATES = [
    "{{ 1/0 }}",
    "{{ messages.x.y }}",
    "{{ messages[9] }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**10**8 }}",
    "{{ [0] * 10**9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('a\\nb') }}",
    "{{ raise_exception([]) }}",
    "{% if %}",
    "{{",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages|tojson(indent='x') }}",
    "{{ strftime_now('%' * 9) }}",
    "{{ strftime_now(3) }}",
    "{{ '\\ud800' }}",
    "{{ namespace(__class__=3) }}",
    "{{ x(3) }}",
    "{{ messages|sort(attribute='z') }}",
    "{{ 'a'|int('b', 99) }}",
    "{{ '%d'|format('x') }}",
    "{{ '%99999999999d'|format(3) }}",
    "{{ 'x'.encode('nowhere') }}",
    "{{ '{:>99999999999}'.format(3) }}",
    "{{ messages|map('nowhere')|list }}",
    "{% set x = messages.append %}{{ x(x) }}",
    "{{ loop }}",
    "{% for m in messages %}{{ m }}{% break %}{% endfor %}",
    "{% generation %}",
    "{{ " + "(" * 500 + ")" * 500 + " }}",
    "{{ 'a'.center(10**9) }}",
    "{{ range(10**20)|list }}",
    "",
    "{% for i in range(3000) %}{% set x = 'y' * 99999 %}{% endfor %}",
    "{{ lipsum(n=99999) }}",
    "{{ messages|batch(0)|list }}",
    "{{ 3|round('x') }}",
    "{{ [1,'a']|sort }}",
    "{{ {}|dictsort(by=3) }}",
    "{{ messages|groupby('x')|list }}",
    "{{ ('a' * 99999) * 99999 }}",
    "{{ 'a'|indent(10**9) }}",
    "{{ cycler() }}",
    "{{ 1 // 0 }}",
    "{{ 2.0 ** 99999 }}",
    "{{ dict(messages) }}",
]


def templates(rng: random.Random, known: object) -> Case:
    """A chat template that fails, in some way of Python's or Jinja's."""
    template = rng.choice(TEMPLATES)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>", "chat_template": template}
    files = {"model/tokenizer_config.json": json.dumps(about)}
    return Case("generate", ("--checkpoint=model", "--chat", f"--prompt={rng.choice(['hi', LONG, 'é'])}"), files)


FILES = ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]


def checkpoints(rng: random.Random, known: object) -> Case:
    """The JSON files of a checkpoint with something wrong in them."""
    name = rng.choice(FILES)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<s>",
        "chat_template": sandbox.TEMPLATE,
        "add_bos_token": False,
    }
    trees: dict[str, Any] = {
        "config.json": {
            **tiny_llama.HF,
            "vocab_size": 300,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "eos_token_id": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        "tokenizer_config.json": about,
        "generation_config.json": {
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.5,
            "eos_token_id": [1, 2],
        },
        "tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []},
    }
    if rng.random() < 0.2:
        text = rng.choice(
            ["", "{", "[" * 100_000, "9" * 5_000, "NaN", "[]", "3", '"x"', "null", '{"a": ' + "1" * 5_000 + "}"]
        )
    else:
        text = json.dumps(_broken(trees[name], rng, JSON))
    command, more = rng.choice(
        [("generate", ("--prompt=hi",)), ("convert", ("--to=new",)), ("chat", ()), ("serve", ())]
    )
    return Case(command, ("--checkpoint=model", *more), {f"model/{name}": text})


TALKS = [
    "hi\n",
    "\n\n",
    "/x\n",
    "/save\n",
    "/save ~nosuchuser/x\n",
    "/save texts\n",
    "/save nowhere/x\n",
    "/save " + LONG + "\n",
    "\udcff\udcfe\n",
    "/save odd/fifo\n",
    "/reset\n/quit\n",
    "/\n",
]


def talk(rng: random.Random, known: object) -> Case:
    """What comes by standard input."""
    text = "".join(rng.choice(TALKS) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.5:
        return Case("chat", ("--checkpoint=model",), more={"stdin": text})
    return Case("generate", ("--checkpoint=model", "--file=-"), more={"stdin": text})


ENVIRONMENT = [
    {"DECODER_LAB_CACHE": value} for value in ("", "~nosuchuser", "texts/a.txt", "odd/loop", LONG, "odd/fifo")
] + [{"SLURM_NTASKS": "x", "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "x", "SLURM_PROCID": "x", "SLURM_LOCALID": "x"}]
ENVIRONMENT += [{"JAX_PLATFORMS": value} for value in ("cuda", "nowhere", "tpu", "cpu,cuda")]
GOOD = [
    ("run", ("--config=toy.py", "--dry-run")),
    ("report", ("done",)),
    ("list", ("--plugs",)),
    ("list", ("--json",)),
    ("lab", ("--help",)),
    ("report", ("done", "swept/../done")),
    ("lab", ("completion", "bash")),
    ("compile", ("--config=toy.py", "--topology=v5e:2x2", "--estimate")),
    ("convert", ("--checkpoint=model", "--to=new")),
    ("generate", ("--checkpoint=model", "--prompt=hi", "--chat")),
    ("run", ("--config=toy.py",)),
]


def places(rng: random.Random, known: object) -> Case:
    """Good commands where output or environment is not what one expects."""
    command, argv = rng.choice(GOOD)
    if rng.random() < 0.3:
        return Case(command, argv, more={"env": rng.choice(ENVIRONMENT)})  # type: ignore[dict-item]
    return Case(command, argv, more={"stdout": rng.choice(["ascii", "closed", "full"])})


KINDS: dict[str, tuple[float, Callable[[random.Random, Any], Case]]] = {
    "overrides": (0.35, overrides),
    "settings": (0.15, settings),
    "programs": (0.1, programs),
    "report": (0.1, report),
    "lines": (0.2, lines),
    "templates": (0.02, templates),
    "checkpoints": (0.04, checkpoints),
    "talk": (0.02, talk),
    "places": (0.02, places),
}


def cases(seed: int, n: int, root: Path, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[tuple[str, Case]]:
    """`n` cases of `kinds` in their shares."""
    rng, known = random.Random(seed), keys()
    weights = [KINDS[kind][0] for kind in kinds]
    for _ in range(n):
        kind = rng.choices(list(kinds), weights)[0]
        case = KINDS[kind][1](rng, known)
        files = {name: text.replace("SANDBOX", str(root)) for name, text in case.files.items()}
        yield kind, dataclasses.replace(case, files=files)
