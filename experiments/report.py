"""The report of a run: Markdown, one HTML file that needs nothing else, and a PNG per curve.

``python -m experiments.report RUN_FOLDER`` writes them into the folder of its ``results.json``, or into ``--out``.
With several folders it prints a comparison of their arms and verdicts, and with ``--out`` writes it there. Of a sweep's
folder it writes tables and plots over the swept keys, with confidence intervals (`experiments.sweeps.report`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reports import plots, results_file, tables
from experiments.reports.html import comparison_page, page
from experiments.sweeps import report as report_sweep
from lm.errors import UserError


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and the pictures of `results` (schema 1) into `folder`; gives their paths.

    Raises `UserError` when `results` are not of schema 1 or `folder` cannot be written to.
    """
    results_file.check(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = plots.write(results, folder)
        report, html = folder / "report.md", folder / "report.html"
        report.write_text(text(results, {name: path.name for name, path in pictures.items()}), encoding="utf-8")
        html.write_text(page(results, pictures), encoding="utf-8")
    except OSError as e:
        raise UserError(f"{folder}: the report cannot be written ({e.strerror or e})") from None
    return [report, html, *pictures.values()]


def text(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The Markdown report; `pictures` maps curve names to image links."""
    paper = results.get("paper", {})
    parts = [f"# {tables.title(results)}"]
    if tables.paper_line(results):
        parts.append(f"Paper: {tables.paper_line(results)}")
    if paper.get("claim"):
        parts.append(f"Its claim: {paper['claim']}")
    if tables.ran(results):
        parts.append(f"What ran: {tables.ran(results)}")
    parts += ["## Verdicts", *_section(tables.claims(results), "No claim was stated.")]
    parts += [f"![{name}]({link})" for name, link in pictures.items()]
    parts += ["## Measurements", "Mean ± standard deviation (number of samples)."]
    for table in tables.metrics(results.get("arms", {})):
        parts += [f"### {table.title}", tables.markdown(table)]
    for table in (tables.paper_numbers(results), tables.texts(results), tables.environment(results)):
        if table.rows:
            parts += [f"## {table.title}", tables.markdown(table)]
    if results.get("config"):
        config = json.dumps(results["config"], indent=2, ensure_ascii=False, default=str)
        parts += ["## Config", f"```json\n{config}\n```"]
    return "\n\n".join(parts) + "\n"


def _section(table: tables.Table, otherwise: str) -> list[str]:
    return [tables.markdown(table) if table.rows else otherwise]


def compare(runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[tables.Table]]:
    """Verdicts side by side, then every measure with a row per run and arm; as Markdown, and as tables."""
    verdicts: dict[str, dict[str, str]] = {}
    arms: dict[str, Mapping[str, Any]] = {}
    for name, results in runs.items():
        for claim in results.get("claims", ()):
            verdicts.setdefault(str(claim["text"]), {})[name] = tables.verdict(claim)
        arms |= {f"{name}: {arm}": values for arm, values in results.get("arms", {}).items()}
    rows = tuple((claim, *(by.get(n, tables.NOTHING) for n in runs)) for claim, by in verdicts.items())
    found = [tables.Table("Verdicts", ("claim", *runs), rows), *tables.metrics(arms)]
    parts = ["# Comparison of " + ", ".join(runs)]
    parts += [f"## {t.title}\n\n{tables.markdown(t)}" for t in found if t.rows]
    return "\n\n".join(parts) + "\n", found


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    absolute = [f.resolve().parts for f in folders]
    for depth in range(1, max(len(p) for p in absolute) + 1):
        names = ["/".join(p[-depth:]) for p in absolute]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report: {folders[0]} is given twice; valid: different run folders")


def main(argv: Sequence[str] | None = None) -> int:
    """Reports one run or sweep, or compares several runs; raises `UserError` for a folder without valid results."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, its results.json, or a sweep's folder")
    parser.add_argument("--out", type=Path, help="folder to write into (default: the folder of the run)")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; valid: a folder, which is made when absent")
    if len(args.runs) == 1 and (folder := Path(args.runs[0])).is_dir() and (folder / "sweep.json").is_file():
        for path in report_sweep.write(folder, args.out or folder):
            print(path)
        return 0
    loaded = [results_file.load(Path(run)) for run in args.runs]
    if len(loaded) == 1:
        for path in write(loaded[0][0], args.out or loaded[0][1]):
            print(path)
        return 0
    runs = dict(zip(_names([folder for _, folder in loaded]), (r for r, _ in loaded), strict=True))
    comparison, found = compare(runs)
    print(comparison, end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "comparison.md").write_text(comparison, encoding="utf-8")
        (args.out / "comparison.html").write_text(comparison_page(list(runs), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
