"""What a run prints: the plan before, the tables and verdicts after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cli import aligned
from experiments.reports import tables
from experiments.running.job import make
from experiments.running.plan import Plan
from experiments.spec.arms import count
from experiments.spec.settings import Experiment


def head(plan: Plan, points: int, kept: int, workdir: Path) -> str:
    exp = plan.exp
    kept_text = f", {kept} of them kept from earlier runs" if kept else ""
    return (
        f"{exp.name} ({exp.scale}): {exp.checkpoint}, {len(plan.chosen)} arms, {points} points{kept_text}; "
        f"folder {workdir}"
    )


def plan(plan: Plan, workdir: Path) -> str:
    """The plan of a dry run: what would be measured on which model."""
    exp, jobs = plan.exp, make(plan)
    shown = [j for j in jobs if j.arm in plan.chosen]
    total = sum(j.cost for j in shown) or 1.0
    lines = [head(plan, len(shown), 0, workdir), f"paper: {tables.paper_line({'paper': _paper(exp)}, link=False)}"]
    if plan.absent:
        lines.append(f"checkpoint not at hand: {plan.absent}")
    rows = [("arm", "parameters", "points", "share of the work", "overrides")]
    for name in plan.chosen:
        arm, mine = plan.arms[name], [j for j in shown if j.arm == name]
        size = "unknown" if arm.model is None else f"{count(arm.model):,}"
        overrides = ", ".join(f"{k}={v!r}" for k, v in exp.arms[name].items()) or "none"
        share = sum(j.cost for j in mine) / total
        rows.append((name, size, str(len(mine)), f"{share:.0%}", overrides))
    return "\n".join([*lines, "", aligned(rows), "", "dry run: nothing was measured or written"])


def _paper(exp: Experiment) -> dict[str, Any]:
    return {"title": exp.paper.title, "arxiv": exp.paper.arxiv}


def end(results: Mapping[str, Any], workdir: Path, written: Sequence[Path]) -> str:
    """Tables of all metrics, every claim with its verdict and numbers, and where the files are."""
    parts = [""]
    for table in tables.metrics(results["arms"]):
        parts += [f"{table.title}, mean ± standard deviation (samples)", aligned([table.header, *table.rows], "  "), ""]
    for claim in results["claims"]:
        numbers = tables.measured(claim["measured"]) if claim["measured"] else ""
        paper = f"the paper: {claim['paper']}" if claim.get("paper") else ""
        missing = f"missing: {claim['missing']}" if claim.get("missing") else ""
        details = "\n".join(f"    {x}" for x in (numbers, missing, paper) if x)
        parts.append(f"{tables.verdict(claim)}  {claim['text']}\n{details}".rstrip())
    if not results["complete"]:
        parts += ["", "incomplete: not every arm and measure of the config has been run"]
    parts += ["", f"results  {workdir / 'results.json'}"]
    pictures = [p for p in written if p.suffix == ".png"]
    parts += [f"plot     {p}" for p in pictures]
    parts += [f"report   {p}" for p in written if p not in pictures]
    return "\n".join(os.fspath(p) for p in parts)
