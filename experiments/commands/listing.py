"""All experiments: paper, claim, scales and the last verdict; all plugs of every socket."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reports import results_file, tables
from experiments.spec import registry
from experiments.spec.settings import experiment
from lm.errors import UserError, unknown
from lm.plug import table as plug_table

PROG = "python -m experiments.list"
SOCKETS = {  # config key -> where its plugs are
    "model.mixer": "lm.mixers",
    "model.pattern": "lm.patterns",
    "model.cache": "lm.caches",
    "model.positions": "lm.positions",
    "model.positions.scaling": "lm.positions.scaling",
    "model.ffn": "lm.ffn",
    "model.ffn.router": "lm.ffn.moe.routers",
    "model.norm": "lm.norms",
    "model.head": "lm.heads",
    "train.objective": "lm.objectives",
    "train.optimizer": "lm.optimizers",
    "train.schedule": "lm.optimizers.schedules",
    "train.augmentation": "lm.positions.augmentation",
    "train.surgery": "lm.surgery",
    "train.tracker": "lm.trackers",
    "measures": "lm.measures",
}


def entries(folder: Path, results: Sequence[Path]) -> list[dict[str, Any]]:
    """One dict per config file; one that does not load has an ``error``. `results`: folders to look for verdicts in,
    the first that has one wins."""
    return [_entry(path, results) for path in registry.files(folder)]


def _entry(path: Path, results: Sequence[Path]) -> dict[str, Any]:
    out: dict[str, Any] = {"file": path.name, "name": path.stem, "error": None}
    try:
        source = registry.load(path)
        default = "laptop" if "laptop" in source.scales else source.scales[0]
        exp = experiment(source.settings(default))
    except (UserError, IndexError) as e:
        return {**out, "error": str(e)}
    paper = {"title": exp.paper.title, "arxiv": exp.paper.arxiv, "claim": exp.paper.claim}
    return {**out, "name": exp.name, "scales": list(source.scales), "paper": paper, "last": last(exp.name, results)}


def last(name: str, folders: Sequence[Path]) -> dict[str, Any] | None:
    """The newest results of experiment `name` in the first folder that has any, with its verdicts counted."""
    for folder in folders:
        found = []
        for file in folder.glob(f"*/{results_file.NAME}"):
            try:
                data, _ = results_file.load(file)
            except UserError:
                continue
            if data["experiment"] == name:
                found.append((file.stat().st_mtime, str(file.parent), data))
        if found:
            _, place, data = max(found, key=lambda f: f[:2])
            counts = Counter(tables.verdict(c) for c in data.get("claims", ()))
            return {"folder": place, "scale": data.get("scale"), "verdicts": dict(counts)}
    return None


def verdict(entry: dict[str, Any]) -> str:
    if not entry["last"]:
        return "not run"
    counts = entry["last"]["verdicts"]
    text = ", ".join(f"{n} {v.lower()}" for v in tables.VERDICTS.values() if (n := counts.get(v)))
    return f"{text or 'no claims'} ({entry['last']['scale']})"


def table(found: Sequence[dict[str, Any]], width: int | None) -> str:
    rows = [("experiment", "scales", "last verdict", "arXiv", "paper: claim")]
    for e in found:
        if e["error"]:
            rows.append((e["name"], "-", "does not load", "-", e["error"]))
        else:
            about = f"{e['paper']['title']}: {e['paper']['claim']}"
            rows.append((e["name"], " ".join(e["scales"]), verdict(e), e["paper"]["arxiv"] or "-", about))
    lines = cli.aligned(rows).split("\n")
    return "\n".join(cut(line, width) for line in lines)


def cut(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def plugs(key: str | None = None) -> list[dict[str, str]]:
    """``{key, name, about}`` of every plug, or of those that the config key `key` takes; `about` is the first sentence
    of its docstring. Raises `UserError` for an unknown key."""
    if key is not None and key not in SOCKETS:
        raise unknown("--plugs", key, SOCKETS)
    out = []
    for place in SOCKETS if key is None else (key,):
        for name, cls in plug_table(SOCKETS[place]).items():
            about = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
            out.append({"key": place, "name": name, "about": about.split(". ")[0].rstrip(".")})
    return out


def run(argv: Sequence[str], doc: str | None = None) -> int:
    parser = cli.Parser(PROG, doc)
    parser.add_argument("--json", action="store_true", help="print JSON with everything in full")
    parser.add_argument("--configs", type=Path, default=registry.CONFIGS, help="folder of config files")
    parser.add_argument(
        "--plugs", nargs="?", const="", metavar="KEY", help="print plugs instead, of a config key or all"
    )
    parsed, rest = parser.parse_known_args(argv)
    parser.refuse(rest)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if parsed.plugs is not None and parsed.configs != registry.CONFIGS:
        raise UserError("--configs: has no meaning with --plugs; valid: one of them")
    if parsed.plugs is not None:
        rows = plugs(parsed.plugs or None)
        lines = cli.aligned([("key", "name", "about"), *(tuple(row.values()) for row in rows)]).split("\n")
        print(json.dumps(rows, indent=2) if parsed.json else "\n".join(cut(line, width) for line in lines))
        return 0
    if not parsed.configs.is_dir():
        raise UserError(f"--configs: {parsed.configs} is not a folder; valid: a folder of config files")
    found = entries(parsed.configs, (registry.ROOT / "results", Path("runs")))
    if parsed.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(table(found, width))
    return 0
