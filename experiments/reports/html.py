"""The HTML of a report: one file, pictures inside it, readable in light and dark, no script, nothing loaded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from experiments.reports import tables

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --fg: #1b1b1b; --bg: #ffffff; --dim: #5a5a5a; --line: #d5d5d5; --head: #f2f3f5;
  --good: #00614a; --bad: #a83a00; --none: #5a5a5a; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e6e6; --bg: #16181c; --dim: #a5a9b0; --line: #3a3e46;
  --head: #22262d; --good: #4cc9a0; --bad: #ff9152; --none: #a5a9b0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.2rem; } h3 { margin: 1.4rem 0 .4rem; }
p.dim, caption { color: var(--dim); }
a { color: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left; vertical-align: top; }
thead th { background: var(--head); }
table.numbers td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.numbers thead th:not(:first-child) { text-align: right; }
.HOLDS { color: var(--good); font-weight: 700; white-space: nowrap; }
.FAILS { color: var(--bad); font-weight: 700; white-space: nowrap; }
.NOT { color: var(--none); font-weight: 700; white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { background: var(--head); padding: 1rem; overflow-x: auto; font-size: 13px; }
</style>
</head>
<body>
$body
</body>
</html>
"""
)


def _table(table: tables.Table, numbers: bool = False) -> str:
    def cell(text: str, first: bool) -> str:
        tag = ' scope="row"' if first and numbers else ""
        kind = f' class="{text.split()[0]}"' if text in tables.VERDICTS.values() else ""
        name = "th" if tag else "td"
        return f"<{name}{tag}{kind}>{escape(text)}</{name}>"

    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table.header)
    rows = "\n".join("<tr>" + "".join(cell(c, i == 0) for i, c in enumerate(row)) + "</tr>" for row in table.rows)
    style = ' class="numbers"' if numbers else ""
    return (
        f'<div class="scroll"><table{style}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _picture(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = escape(f"{name}, all arms; the numbers are in the tables below", quote=True)
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'


def page(run: tables.Tables, pictures: Mapping[str, Path]) -> str:
    """The whole report; verdicts first, then pictures, tables, texts, environment and config."""
    parts = [f"<h1>{escape(run.title)}</h1>"]
    if run.paper:
        arxiv = escape(run.paper["arxiv"], quote=True)
        link = f' (<a href="https://arxiv.org/abs/{arxiv}">arXiv:{arxiv}</a>)' if arxiv else ""
        parts.append(f"<p>{escape(run.paper['title'])}{link}</p>")
        if run.paper["claim"]:
            parts.append(f"<p>Its claim: {escape(run.paper['claim'])}</p>")
    parts.append(f'<p class="dim">{escape(run.ran)}</p>')
    parts += ["<h2>Verdicts</h2>", _table(run.claims) if run.claims.rows else "<p>No claim was stated.</p>"]
    if pictures:
        parts += ["<h2>Plots</h2>", *(_picture(name, path) for name, path in pictures.items())]
    parts += ["<h2>Measurements</h2>", '<p class="dim">Mean ± standard deviation (number of samples)</p>']
    for table in run.metrics:
        parts += [f"<h3>{escape(table.title)}</h3>", _table(table, numbers=True)]
    for table in run.rest:
        parts += [f"<h2>{escape(table.title)}</h2>", _table(table)]
    if run.config:
        parts += ["<h2>Config</h2>", f"<details><summary>as it ran</summary><pre>{escape(run.config)}</pre></details>"]
    return _PAGE.substitute(title=escape(run.title), body="\n".join(parts))


def comparison_page(runs: Sequence[str], found: Sequence[tables.Table]) -> str:
    """Several runs in one page of tables."""
    title = "Comparison of " + ", ".join(runs)
    parts = [f"<h1>{escape(title)}</h1>"]
    for i, table in enumerate(t for t in found if t.rows):
        parts += [f"<h2>{escape(table.title)}</h2>", _table(table, numbers=i > 0 or table.title != "Verdicts")]
    return _PAGE.substitute(title=escape(title), body="\n".join(parts))


def sections_page(title: str, said: Sequence[str], pictures: Mapping[str, Path], found: Sequence[tables.Table]) -> str:
    """Sentences, pictures, and a section per table of numbers."""
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="dim">{escape(x)}</p>' for x in said)]
    parts += [_picture(name, path) for name, path in pictures.items()]
    parts += [f"<h2>{escape(t.title)}</h2>\n{_table(t, numbers=True)}" for t in found]
    return _PAGE.substitute(title=escape(title), body="\n".join(parts))
