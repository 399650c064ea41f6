"""A paper's claim as code: a predicate over the means that a run has measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Verdict = tuple[bool, dict[str, float]]


class Missing(KeyError):
    """An arm or metric that this run has not measured (yet); makes a claim *not measured* instead of failing it."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Claim:
    """`holds`: None when a number is missing, and `missing` then says which. `paper`: the paper's own number."""

    text: str
    holds: bool | None
    measured: dict[str, Any] = field(default_factory=dict)
    paper: Any = None
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        out = {"text": self.text, "holds": self.holds, "measured": self.measured, "paper": self.paper}
        return out if self.missing is None else {**out, "missing": self.missing}


@dataclass(frozen=True)
class Results:
    """What a run has measured: ``{arm: {"<label>/<metric>": {"mean", "std", "n"}}}``, and the baseline arm's name."""

    measured: Mapping[str, Mapping[str, Mapping[str, Any]]]
    baseline: str = ""

    @property
    def arms(self) -> list[str]:
        """The arms with at least one number, in the config's order."""
        return [arm for arm, metrics in self.measured.items() if metrics]

    def has(self, arm: str, metric: str) -> bool:
        return metric in self.measured.get(arm, {})

    def mean(self, arm: str, metric: str) -> float:
        """The mean over samples and seeds; inside a claim, a missing one makes the claim *not measured*."""
        return float(self._stat(arm, metric)["mean"])

    def std(self, arm: str, metric: str) -> float:
        """The sample standard deviation; missing when there is one sample."""
        std = self._stat(arm, metric)["std"]
        if std is None:
            raise Missing(f"{arm} {metric}: one sample has no standard deviation")
        return float(std)

    def n(self, arm: str, metric: str) -> int:
        return int(self._stat(arm, metric)["n"])

    def _stat(self, arm: str, metric: str) -> Mapping[str, Any]:
        if not self.has(arm, metric):
            raise Missing(f"{arm} {metric}")
        return self.measured[arm][metric]


def claim(text: str, fn: Callable[[], Verdict], paper: Any = None) -> Claim:
    """Judges one claim: ``fn() -> (holds, {what: number})``, with `Results` in reach of its closure.

    A `KeyError` counts as missing too, so that a claim may index dicts that it built from what was measured.
    """
    try:
        holds, measured = fn()
    except KeyError as e:
        what = str(e) if isinstance(e, Missing) else str(e.args[0] if e.args else e)
        return Claim(text, None, {}, paper, what)
    return Claim(text, bool(holds), dict(measured), paper)
