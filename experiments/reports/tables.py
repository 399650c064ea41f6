"""Numbers, tables and verdicts as text: what the Markdown, the HTML and RESULTS.md have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ENVIRONMENT = "Environment"  # the title of the table of what a run ran on
NOTHING = "—"  # a metric that an arm was not measured on
VERDICTS = {True: "HOLDS", False: "FAILS", None: "NOT MEASURED"}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column labels the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: object) -> str:
    """Three decimals for everyday sizes, an exponent outside them, whole numbers as they are."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isnan(value) or math.isinf(value):
        return "NaN" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value)) if isinstance(value, int) or value != 0 else "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"


def cell(value: object) -> str:
    """``mean ± std (n)``; without the spread when there is one sample or none is given."""
    if not isinstance(value, Mapping):
        return number(value)
    mean, std, n = value.get("mean"), value.get("std"), value.get("n")
    if mean is None:
        return NOTHING
    spread = f" ± {number(std)}" if std is not None and (n is None or n > 1) else ""
    return number(mean) + spread + (f" ({n})" if n is not None else "")


def metrics(arms: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """One table per measure (the part of a metric's name before the slash): a row per arm that has any of it."""
    grouped: dict[str, dict[str, None]] = {}
    for values in arms.values():
        for name in values:
            grouped.setdefault(name.rpartition("/")[0], {})[name] = None
    out = []
    for title, names in grouped.items():
        rows = [
            (arm, *(cell(values[n]) if n in values else NOTHING for n in names))
            for arm, values in arms.items()
            if any(n in values for n in names)
        ]
        out.append(Table(title or "metrics", ("arm", *(n.rpartition("/")[2] for n in names)), tuple(rows)))
    return out


def measured(values: object) -> str:
    """``name = number; …`` of a claim's measured values."""
    if isinstance(values, Mapping):
        return "; ".join(f"{k} = {cell(v)}" for k, v in values.items()) or NOTHING
    return cell(values)


def verdict(claim: Mapping[str, Any]) -> str:
    return VERDICTS[claim.get("holds")]


def claims(results: Mapping[str, Any]) -> Table:
    rows = tuple(
        (verdict(c), str(c["text"]), measured(c.get("measured")), str(c.get("paper") or NOTHING))
        for c in results.get("claims", ())
    )
    return Table("Claims", ("verdict", "claim", "measured here", "the paper"), rows)


def paper_numbers(results: Mapping[str, Any]) -> Table:
    numbers = results.get("paper", {}).get("numbers") or {}
    pairs = numbers.items() if isinstance(numbers, Mapping) else [("", numbers)]
    return Table("The paper's numbers", ("what", "the paper"), tuple((str(k), cell(v)) for k, v in pairs))


def texts(results: Mapping[str, Any]) -> Table:
    """Every document named anywhere in the notes, once, with its source and licence."""
    found: dict[tuple[str, ...], None] = {}

    def walk(node: object) -> None:
        if isinstance(node, Mapping):
            if "name" in node and "licence" in node:
                row = (node["name"], number(node.get("tokens")), node.get("source", NOTHING), node["licence"])
                found[tuple(str(x) for x in row)] = None
            for value in node.values():
                walk(value)
        elif isinstance(node, Sequence) and not isinstance(node, str):
            for value in node:
                walk(value)

    walk(results.get("notes", {}))
    return Table("Texts", ("document", "tokens", "source", "licence"), tuple(found))


def environment(results: Mapping[str, Any]) -> Table:
    rows = []
    for key, value in results.get("environment", {}).items():
        nested = isinstance(value, dict | list)
        rows.append((str(key), json.dumps(value, ensure_ascii=False) if nested else number(value)))
    return Table(ENVIRONMENT, ("what", "value"), tuple(rows))


def ran(results: Mapping[str, Any]) -> str:
    """One sentence: scale, seeds, seconds, device, commit; only what is known."""
    env, config = results.get("environment", {}), results.get("config", {})
    seeds = config.get("seeds")
    facts = {
        "scale": results.get("scale"),
        "checkpoint": config.get("checkpoint"),
        "seeds": ", ".join(str(s) for s in seeds)
        if isinstance(seeds, Sequence) and not isinstance(seeds, str)
        else seeds,
        "seconds": None if env.get("seconds") is None else f"{float(env['seconds']):.0f}",
        "device": env.get("device"),
        "commit": str(env["commit"])[:12] if env.get("commit") else None,
    }
    return "; ".join(f"{k} {v}" for k, v in facts.items() if v not in (None, ""))


def title(results: Mapping[str, Any]) -> str:
    scale = results.get("scale")
    return str(results["experiment"]) + (f" ({scale})" if scale else "")


def paper_line(results: Mapping[str, Any], link: bool = True) -> str:
    """The paper's title and arXiv number, as a Markdown link when `link`."""
    paper = results.get("paper", {})
    name, arxiv = paper.get("title") or "", paper.get("arxiv") or ""
    if not arxiv:
        return str(name)
    where = f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})" if link else f"arXiv:{arxiv}"
    return f"{name} ({where})" if name else where


@dataclass(frozen=True)
class Tables:
    """All that the report of a run says, once for its Markdown, its HTML and its pictures.

    `paper`: title, arXiv number and claim, empty where there is none. `ran`: scale, seeds, seconds, device, commit.
    `rest`: the paper's numbers, texts, environment, those that have rows. `curves`: curve name -> arm -> curve;
    `arms`: all arms in the config's order, whose places choose their colours.
    """

    title: str
    paper: Mapping[str, str]
    ran: str
    claims: Table
    metrics: tuple[Table, ...]
    rest: tuple[Table, ...]
    config: str
    curves: Mapping[str, Mapping[str, Mapping[str, Any]]]
    arms: tuple[str, ...]

    @staticmethod
    def of(results: Mapping[str, Any]) -> Tables:
        """From the content of a results.json."""
        curves: dict[str, dict[str, Mapping[str, Any]]] = {}
        for arm, by_name in results.get("curves", {}).items():
            for name, curve in by_name.items():
                curves.setdefault(name, {})[arm] = curve
        paper = results.get("paper", {})
        config = results.get("config")
        return Tables(
            title=title(results),
            paper={key: str(paper.get(key) or "") for key in ("title", "arxiv", "claim")} if paper else {},
            ran=ran(results),
            claims=claims(results),
            metrics=tuple(metrics(results.get("arms", {}))),
            rest=tuple(t for t in (paper_numbers(results), texts(results), environment(results)) if t.rows),
            config=json.dumps(config, indent=2, ensure_ascii=False, default=str) if config else "",
            curves=curves,
            arms=tuple(dict.fromkeys([*results.get("arms", {}), *results.get("curves", {})])),
        )

    def line(self, link: bool = True) -> str:
        """The paper's title and arXiv number, as a Markdown link when `link`."""
        return paper_line({"paper": self.paper}, link)
