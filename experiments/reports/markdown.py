"""Reports as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.reports.tables import Table, Tables


def table(of: Table) -> str:
    """A Markdown table; bars and line breaks inside cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"

    rule = "| " + " | ".join(["---"] * len(of.header)) + " |"
    return "\n".join([line(of.header), rule, *(line(row) for row in of.rows)])


def report(run: Tables, pictures: Mapping[str, str]) -> str:
    """The report of a run; `pictures` maps curve names to image links."""
    parts = [f"# {run.title}"]
    if run.line():
        parts.append(f"Paper: {run.line()}")
    if run.paper.get("claim"):
        parts.append(f"Its claim: {run.paper['claim']}")
    if run.ran:
        parts.append(f"What ran: {run.ran}")
    parts += ["## Verdicts", table(run.claims) if run.claims.rows else "No claim was stated."]
    parts += [f"![{name}]({link})" for name, link in pictures.items()]
    parts += ["## Measurements", "Mean ± standard deviation (number of samples)."]
    for one in run.metrics:
        parts += [f"### {one.title}", table(one)]
    for one in run.rest:
        parts += [f"## {one.title}", table(one)]
    if run.config:
        parts += ["## Config", f"```json\n{run.config}\n```"]
    return "\n\n".join(parts) + "\n"


def comparison(runs: Sequence[str], found: Sequence[Table]) -> str:
    """Several runs side by side."""
    parts = ["# Comparison of " + ", ".join(runs)]
    parts += [f"## {one.title}\n\n{table(one)}" for one in found if one.rows]
    return "\n\n".join(parts) + "\n"
