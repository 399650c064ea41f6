"""The experiment on the Fourier head: what is trained for what, and claims on numbers whose verdict is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs import fourier_head as config
from experiments.running.job import make
from experiments.running.plan import prepare
from experiments.spec import registry
from experiments.spec.claims import Results
from lm.errors import UserError
from lm.measures.language.smoothness import smoothness
from lm.measures.tasks import density_tasks

PATH = registry.CONFIGS / "fourier_head.py"


def plan(scale: str, *overrides: tuple[str, Any]) -> Any:
    return prepare(registry.load(PATH).settings(scale), overrides, None)


def test_only_what_reads_parameters_is_trained() -> None:
    jobs = {(j.arm, j.label): j for j in make(plan("laptop"))}
    trained = {arm for (arm, _), j in jobs.items() if j.trains}
    assert trained == {"linear", "fourier_16", "fourier_64"}
    assert not jobs["linear", "gaussian"].trains and not jobs["ets", "demand"].trains
    assert jobs["linear", "demand"].trains and jobs["fourier_16", "smoothness"].trains


@pytest.mark.parametrize("scale", config.SCALES)
def test_every_scale_is_a_checked_plan(scale: str) -> None:
    """Also where the vocabulary is smaller than that of bytes, the tokenizer of models that are not trained."""
    made = plan(scale)
    assert len(make(made)) >= 9
    if scale == "atari":
        assert made.arms["fourier"].model.head.order == config.ACTIONS and made.arms["fourier"].train.steps > 0


def test_seaquests_actions_in_the_papers_order() -> None:
    names = "NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE".split()
    names += ["UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE"]
    clockwise = "LEFT UPLEFT UP UPRIGHT RIGHT DOWNRIGHT DOWN DOWNLEFT".split()
    want = ["NOOP", *clockwise, *(f"{d}FIRE" for d in clockwise), "FIRE"]
    assert sorted(names, key=lambda n: config.ACTIONS[names.index(n)]) == want


def test_one_line_changes_the_head() -> None:
    made = plan("smoke", ("model.head", "fourier"))
    assert type(made.arms["linear"].model.head).__name__ == "Fourier"
    with pytest.raises(UserError, match=r"model\.head\.order: 2 bins, but model\.vocab_size = 32"):
        plan("smoke", ("model.head", {"name": "fourier", "order": (1, 0)}))


def results(**change: float) -> Results:
    """Numbers for which every claim holds, but for what is changed: ``arm__label__metric = value``."""
    kl = {"linear": 0.2, "fourier": 0.15, "regularised": 0.16, "shuffled": 0.9}
    s = {"linear": 0.12, "fourier": 0.06, "regularised": 0.05}
    made: dict[str, dict[str, float]] = {}
    for t in config.TASKS:
        for arm, value in kl.items():
            made.setdefault(arm, {})[f"{t}/kl"] = value
        for arm, value in s.items():
            made[arm][f"{t}/smoothness"] = value
        made.setdefault("mixture", {})[f"{t}/kl"] = 0.4 if t == "beta" else 0.03
        for n in config.FREQUENCIES:
            made["fourier"][f"{t}/kl@{n}"] = 1 / n
            made["fourier"][f"{t}/smoothness@{n}"] = 0.06 - 0.2 / n**3
            xy = np.array([[0.1, 0.3]])
            cut = float(smoothness(density_tasks.truncated("gaussian", xy, 50, n))[0])
            made.setdefault("theorem", {})[f"{t}/smoothness@{n}"] = cut
    for arm, mase, wql, rough in (
        ("linear", 1.0, 0.1, 0.02),
        ("fourier_16", 1.1, 0.1, 0.01),
        ("fourier_64", 0.9, 0.1, 0.015),
    ):
        for label in config.SERIES:
            made.setdefault(arm, {}).update({f"{label}/mase": mase, f"{label}/wql": wql})
        made[arm]["smoothness/smoothness"] = rough
    for arm in ("seasonal_naive", "ets"):
        made[arm] = {f"{label}/{m}": 1.0 for label in config.SERIES for m in ("mase", "wql")}
    for place, value in change.items():
        arm, label, metric = place.split("__")
        made[arm][f"{label}/{metric}"] = value
    stats = {a: {k: {"mean": v, "std": 0.0, "n": 3} for k, v in m.items()} for a, m in made.items()}
    return Results(stats, "linear")


BREAKS = [
    {"fourier__beta__kl": 0.21},
    {"fourier__gmm2__smoothness": 0.13},
    {"mixture__beta__kl": 0.1},
    {"shuffled__gaussian__kl": 0.19},
    {"fourier__beta__smoothness@20": 0.05},
    {"fourier__gaussian__kl@20": 0.6},
    {"fourier_64__temperature__mase": 0.97},
    {"fourier_64__demand__wql": 0.102},
    {"fourier_16__smoothness__smoothness": 0.03},
]


def test_claims_hold_and_break_one_by_one() -> None:
    verdicts = [c.holds for c in config.claims(results())]
    assert verdicts == [True] * len(BREAKS)
    for i, change in enumerate(BREAKS):
        broken = [c.holds for c in config.claims(results(**change))]
        assert broken == [n != i for n in range(len(BREAKS))], change


def test_claims_without_numbers_are_not_judged() -> None:
    assert [c.holds for c in config.claims(Results({"linear": {}}, "linear"))] == [None] * len(BREAKS)
