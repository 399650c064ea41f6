"""The report of a run: Markdown, one HTML file that needs nothing else, and a PNG per curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.reports import html, markdown, plots, tables
from experiments.reports.tables import Table, Tables
from lm.errors import UserError
from lm.files import write_text


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and the pictures of `results` (schema 1) into `folder`; gives their paths.

    Raises `UserError` when `folder` cannot be written to.
    """
    run = Tables.of(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = plots.write(run, folder)
        text, page = folder / "report.md", folder / "report.html"
        write_text(text, markdown.report(run, {name: p.name for name, p in pictures.items()}))
        write_text(page, html.page(run, pictures))
    except OSError as e:
        raise UserError(f"{folder}: the report cannot be written ({e.strerror or e})") from None
    return [text, page, *pictures.values()]


def compare(runs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Verdicts side by side, then every measure with a row per run and arm."""
    verdicts: dict[str, dict[str, str]] = {}
    arms: dict[str, Mapping[str, Any]] = {}
    for name, results in runs.items():
        for claim in results.get("claims", ()):
            verdicts.setdefault(str(claim["text"]), {})[name] = tables.verdict(claim)
        arms |= {f"{name}: {arm}": values for arm, values in results.get("arms", {}).items()}
    rows = tuple((claim, *(by.get(n, tables.NOTHING) for n in runs)) for claim, by in verdicts.items())
    return [Table("Verdicts", ("claim", *runs), rows), *tables.metrics(arms)]
