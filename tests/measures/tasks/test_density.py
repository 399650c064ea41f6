"""The synthetic study: its data and true densities, what a head learns of them, and the law of smoothness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lm.config import model_config
from lm.errors import UserError
from lm.measures import TABLE, Subject
from lm.measures.language.smoothness import smoothness
from lm.measures.tasks import density_tasks as tasks
from lm.measures.tasks.density import scaling_law
from lm.model.language_model import DecoderModel

LINEAR = {"name": "linear", "tie": False, "bias": True}


def measure(head: dict[str, Any], seed: int = 0, **fields: Any) -> Any:
    plug = TABLE["conditional_density"](**{"samples": 400, "epochs": 3, "bins": 20, "hidden": (16, 12), **fields})
    return plug.run(Subject(DecoderModel(model_config({"head": head})), None, None, seed), lambda fraction, text: None)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_follow_the_density(task: str) -> None:
    """Probability integral transform: the distribution function at z, given (x, y), is uniform."""
    xy, z = tasks.sample(task, 3000, np.random.default_rng(0))
    grid = np.linspace(-1.4, 1.4, 2801)[:-1] + 0.0005
    p = tasks.density(task, xy, grid)
    p[~np.isfinite(p)] = 0.0
    cdf = np.cumsum(p, 1) / p.sum(1, keepdims=True)
    at = np.clip(np.searchsorted(grid, z), 0, len(grid) - 1)
    u = np.sort(cdf[np.arange(len(z)), at])
    assert np.abs(u - np.arange(len(z)) / len(z)).max() < 1.8 / np.sqrt(len(z))  # Kolmogorov-Smirnov, far in the tail
    np.testing.assert_allclose(tasks.pmf(task, xy[:50], 20).sum(1), 1.0, rtol=1e-12)


def test_truncation_converges_to_the_density() -> None:
    """Many terms give the true distribution, one term a single cosine of the density's own first coefficient."""
    xy = np.array([[0.1, 0.2], [-0.3, 0.15]])
    np.testing.assert_allclose(tasks.truncated("gaussian", xy, 50, 60), tasks.pmf("gaussian", xy, 50), atol=1e-6)
    one = tasks.truncated("gaussian", xy, 50, 1)
    decay = np.exp(-((np.pi * 0.1) ** 2) / 2)  # of a Gaussian of deviation 0.1
    want = 0.5 + decay * np.cos(np.pi * (tasks.centres(50) - xy[:, 1:]))
    np.testing.assert_allclose(one, want / want.sum(1, keepdims=True), atol=1e-6)


def test_quantise_is_the_nearest_centre() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 200)
    np.testing.assert_array_equal(tasks.quantise(x, 50), np.abs(x[:, None] - tasks.centres(50)).argmin(1))
    np.testing.assert_array_equal(tasks.quantise(np.array([-3.0, 3.0]), 50), [0, 49])


def test_training_finds_the_density() -> None:
    """Far below the divergence of the untrained network; the same seed gives the same numbers, another one others."""
    start, done = (measure({"name": "fourier", "frequencies": 6}, epochs=e, samples=2000) for e in (1, 30))
    assert done.samples["kl"][0] < 0.4 * start.samples["kl"][0]
    again = measure({"name": "fourier", "frequencies": 6}, epochs=30, samples=2000)
    assert again.samples == done.samples
    assert measure({"name": "fourier", "frequencies": 6}, seed=1).samples["kl"] != done.samples["kl"]


def test_sweep_of_frequencies() -> None:
    """One run per N; the head's own N stands alone as well; heads without N are level; more N, less smooth."""
    swept = measure({"name": "fourier", "frequencies": 4}, frequencies=(1, 4, 9), epochs=20)
    assert swept.samples["kl@4"] == swept.samples["kl"]
    rising = swept.curves["smoothness"]["y"]
    assert rising == sorted(rising) and rising == [swept.samples[f"smoothness@{n}"][0] for n in (1, 4, 9)]
    alone = measure({"name": "fourier", "frequencies": 4}, epochs=20)
    assert alone.samples["kl"] == swept.samples["kl"] and alone.curves == {}
    level = measure(LINEAR, frequencies=(1, 4, 9))
    assert set(level.curves["kl"]["y"]) == {level.samples["kl"][0]} and "kl@4" not in level.samples


def test_truncated_needs_no_training() -> None:
    done = measure(LINEAR, task="gmm2", truncated=True, frequencies=(2, 30), bins=50)
    assert "kl" not in done.samples and set(done.curves) == {"smoothness"}
    assert done.samples["smoothness@2"][0] < done.samples["true_smoothness"][0]
    np.testing.assert_allclose(done.samples["smoothness@30"], done.samples["true_smoothness"], rtol=1e-3)


def test_regulariser_counts_in_training() -> None:
    """A weight that dominates the likelihood flattens what is learned."""
    free = measure({"name": "fourier", "frequencies": 6}, epochs=20)
    bound = measure({"name": "fourier", "frequencies": 6, "gamma": 1.0, "reg_on": "normalized"}, epochs=20)
    assert bound.samples["smoothness"][0] < 0.5 * free.samples["smoothness"][0]


def test_shuffled_bins_are_read_in_their_order() -> None:
    """In the order of the bins that the head was told, what it learns is smooth; in the order of the ids it is not."""
    from lm.measures.tasks.density import ConditionalDensity

    plug = ConditionalDensity(samples=400, epochs=40, bins=20, hidden=(16, 12))
    head = model_config({"head": {"name": "fourier", "frequencies": 3, "shuffle": 1}}).head
    xy, z = tasks.sample("gaussian", 400, np.random.default_rng(0))
    q = plug._learn(head, 0, xy, z, 320)
    got = measure({"name": "fourier", "frequencies": 3, "shuffle": 1}, epochs=40).samples["smoothness"][0]
    assert got < 0.8 * smoothness(q).mean()


def test_scaling_law_recovers_its_constants() -> None:
    N = np.array([2, 4, 8, 12, 16, 20])
    fit = scaling_law(N, 0.3 - 0.5 / N ** (2 * 2.25 - 1))
    assert abs(fit["t"] - 2.25) < 0.02 and abs(fit["c1"] - 0.3) < 1e-4 and fit["r2"] > 0.9999
    np.testing.assert_allclose(fit["c2"], 0.5, rtol=0.05)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bins": 1}, r"bins: too small, found 1"),
    ({"epochs": 0}, r"epochs: too small, found 0"),
    ({"samples": 40, "batch": 33}, r"batch: 33 rows, 32 are trained on"),
    ({"hidden": ()}, r"hidden: found \(\)"),
    ({"frequencies": (0, 2)}, r"frequencies: each at least 1, found \(0, 2\)"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"measures\.conditional_density\." + message):
        TABLE["conditional_density"](**fields)


def test_tied_heads_are_refused() -> None:
    with pytest.raises(UserError, match=r"the head reads the embedding table.*model\.head\.tie = False"):
        measure({"name": "linear"})


def test_orders_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.head\.order: 3 bins, but model\.vocab_size = 20"):
        plug = TABLE["conditional_density"](samples=100, epochs=1, bins=20, batch=8)
        head = model_config({"vocab_size": 3, "head": {"name": "fourier", "order": (2, 0, 1)}})
        plug.run(Subject(DecoderModel(head), None, None, 0), lambda fraction, text: None)
