"""``RESULTS.md`` from the committed ``results/*/results.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reports import markdown, results_file, tables
from experiments.reports.tables import Tables
from experiments.spec import registry
from lm.errors import UserError
from lm.files import write_text

COMMAND = "python -m experiments.results_page"
HEADER = f"""# Results

Generated from `results/*/results.json` by `{COMMAND}`; do not edit by hand. A claim that
fails is listed with its numbers like one that holds. Numbers are mean ± standard deviation (number of samples)."""


def generate(root: Path) -> str:
    """The page for the repository at `root`: a section per folder of ``results/``, in the order of their names."""
    files = sorted((root / "results").glob(f"*/{results_file.NAME}"))
    if not files:
        return HEADER + "\n\nThere are no results yet.\n"
    return "\n\n".join([HEADER, *(_section(*results_file.load(f), root) for f in files)]) + "\n"


def _section(results: Mapping[str, Any], folder: Path, root: Path) -> str:
    run = Tables.of(results)
    parts = [
        *markdown.head(run, "##"),
        f"What ran: {markdown.escaped(run.ran)}. Folder: `{folder.relative_to(root).as_posix()}`",
    ]
    parts += [markdown.table(run.claims)] if run.claims.rows else ["No claim was stated."]
    parts += [f"![{p.stem}]({p.relative_to(root).as_posix()})" for p in sorted(folder.glob("*.png"))]
    shown = [t for t in run.rest if t.title != tables.ENVIRONMENT]
    for table in (*run.metrics, *shown):
        parts += [f"### {markdown.escaped(table.title)}", markdown.table(table)]
    return "\n\n".join(parts)


def run(argv: Sequence[str], doc: str | None = None) -> int:
    """Writes or checks ``RESULTS.md``; exit code 1 when the check finds it out of date."""
    parser = cli.Parser(COMMAND, doc)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if RESULTS.md is out of date")
    parser.add_argument("--root", type=Path, default=registry.ROOT, help="the repository")
    args, unknown = parser.parse_known_args(argv)
    parser.refuse(unknown)
    if not args.root.is_dir():
        raise UserError(f"--root: {args.root} is not a folder; valid: a repository with results/")
    page, path = generate(args.root), args.root / "RESULTS.md"
    if not args.check:
        write_text(path, page)
        print(path)
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        return 0
    print(f"{path} is out of date; run: {COMMAND}", file=sys.stderr)
    return 1
