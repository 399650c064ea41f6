"""``RESULTS.md`` from the committed ``results/*/results.json``.

``python -m experiments.results_page`` writes it; with ``--check`` it only says whether the file is up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reports import results_file, tables
from lm.errors import UserError

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
    paper = results.get("paper", {})
    parts = [f"## {tables.title(results)}"]
    if tables.paper_line(results):
        parts.append(f"Paper: {tables.paper_line(results)}")
    if paper.get("claim"):
        parts.append(f"Its claim: {paper['claim']}")
    parts.append(f"What ran: {tables.ran(results)}. Folder: `{folder.relative_to(root).as_posix()}`")
    claims, read = tables.claims(results), tables.texts(results)
    parts += [tables.markdown(claims)] if claims.rows else ["No claim was stated."]
    parts += [f"![{p.stem}]({p.relative_to(root).as_posix()})" for p in sorted(folder.glob("*.png"))]
    for table in tables.metrics(results.get("arms", {})):
        parts += [f"### {table.title}", tables.markdown(table)]
    for table in (tables.paper_numbers(results), read):
        if table.rows:
            parts += [f"### {table.title}", tables.markdown(table)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks ``RESULTS.md``; exit code 1 when the check finds it out of date."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if RESULTS.md is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        raise UserError(f"--root: {args.root} is not a folder; valid: a repository with results/")
    page, path = generate(args.root), args.root / "RESULTS.md"
    if not args.check:
        path.write_text(page, encoding="utf-8")
        print(path)
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        return 0
    print(f"{path} is out of date; run: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
