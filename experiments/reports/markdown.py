"""Reports as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from experiments.reports.tables import Table, Tables

# What Markdown would read as more than itself: marks, links, HTML, and underscores that are not inside a word.
_MARKS = re.compile(r"[\\`*\[\]|~]|<(?=[A-Za-z/!?])|&(?=[#\w]+;)|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """A name or another's words as one line of plain text."""
    return " ".join(_MARKS.sub(lambda found: "\\" + found[0], text).split())


def table(of: Table) -> str:
    """A Markdown table of plain text."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(escaped(c) for c in cells) + " |"

    rule = "| " + " | ".join(["---"] * len(of.header)) + " |"
    return "\n".join([line(of.header), rule, *(line(row) for row in of.rows)])


def head(run: Tables, level: str) -> list[str]:
    """A run's title behind the marks of `level`, its paper and what that claims."""
    parts = [f"{level} {escaped(run.title)}"]
    if run.line():
        parts.append(f"Paper: {_paper(run)}")
    if run.paper.get("claim"):
        parts.append(f"Its claim: {escaped(str(run.paper['claim']))}")
    return parts


def _paper(run: Tables) -> str:
    """The paper's title, and its arXiv number as a link."""
    name, arxiv = escaped(run.paper.get("title", "")), run.paper.get("arxiv", "")
    if not arxiv:
        return name
    where = f"[arXiv:{escaped(arxiv)}](https://arxiv.org/abs/{quote(arxiv)})"
    return f"{name} ({where})" if name else where


def report(run: Tables, pictures: Mapping[str, str]) -> str:
    """The report of a run; `pictures` maps curve names to image links."""
    parts = head(run, "#")
    if run.ran:
        parts.append(f"What ran: {escaped(run.ran)}")
    parts += ["## Verdicts", table(run.claims) if run.claims.rows else "No claim was stated."]
    parts += [f"![{escaped(name)}]({link})" for name, link in pictures.items()]
    parts += ["## Measurements", "Mean ± standard deviation (number of samples)."]
    for one in run.metrics:
        parts += [f"### {escaped(one.title)}", table(one)]
    for one in run.rest:
        parts += [f"## {escaped(one.title)}", table(one)]
    if run.config:
        parts += ["## Config", f"```json\n{run.config}\n```"]
    return "\n\n".join(parts) + "\n"


def comparison(runs: Sequence[str], found: Sequence[Table]) -> str:
    """Several runs side by side."""
    parts = ["# Comparison of " + ", ".join(map(escaped, runs))]
    parts += [f"## {escaped(one.title)}\n\n{table(one)}" for one in found if one.rows]
    return "\n\n".join(parts) + "\n"
