"""The smoothness of distributions against loops, against hand computation, and on a decoder."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from lm.config import model_config
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.measures import TABLE, Subject
from lm.measures.language.smoothness import in_order, smoothness
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

ALPHA = np.array([6 / (np.pi**2 * s**2) for s in range(1, 101)])


def by_definition(y: np.ndarray) -> float:
    m, out = len(y), 0.0
    for sigma in range(1, 101):
        weights = {d: np.exp(-(d**2) / (2 * sigma**2)) for d in range(-(m - 1), m)}
        total = sum(weights.values())
        smooth = [sum(w / total * y[(i - d) % m] for d, w in weights.items()) for i in range(m)]
        out += ALPHA[sigma - 1] * np.sqrt(sum((a - b) ** 2 for a, b in zip(y, smooth, strict=True)))
    return out


@pytest.mark.parametrize("m", [2, 5, 18])
def test_equals_the_definition(m: int) -> None:
    y = np.random.default_rng(m).dirichlet(np.ones(m), 3)
    np.testing.assert_allclose(smoothness(y), [by_definition(row) for row in y], rtol=1e-10)


def test_equals_scipys_filter() -> None:
    y = np.random.default_rng(0).dirichlet(np.ones(50), 4)
    for row, got in zip(y, smoothness(y), strict=True):
        filtered = [gaussian_filter1d(row, s, mode="wrap", radius=49) for s in range(1, 101)]
        want = sum(a * np.linalg.norm(row - f) for a, f in zip(ALPHA, filtered, strict=True))
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_two_bins_by_hand() -> None:
    """y = (1, 0). The filter takes the share g = 2w / (1 + 2w), w = exp(-1 / (2 sigma^2)), from the other bin: what is
    left is 1 - g and g, at a distance of g sqrt(2)."""
    w = np.exp(-1 / (2 * np.arange(1, 101) ** 2))
    want = np.sum(ALPHA * np.sqrt(2) * 2 * w / (1 + 2 * w))
    np.testing.assert_allclose(smoothness([[1.0, 0.0]]), [want], rtol=1e-12)


def test_flat_is_zero_and_one_cosine_is_an_eigenvector() -> None:
    """cos(2 pi j / m) is scaled by G, so |y - G y| = (1 - G) |y|; turning y round the circle changes nothing."""
    m = 24
    np.testing.assert_allclose(smoothness(np.full((1, m), 1 / m)), [0.0], atol=1e-15)
    wave = np.cos(2 * np.pi * np.arange(m) / m)
    factor = []
    for sigma in range(1, 101):
        d = np.arange(-(m - 1), m)
        w = np.exp(-(d**2) / (2 * sigma**2))
        factor.append(1 - (w / w.sum() * np.cos(2 * np.pi * d / m)).sum())
    want = np.dot(ALPHA, factor) * np.linalg.norm(wave) * 0.3 / m
    np.testing.assert_allclose(smoothness([(1 + 0.3 * wave) / m]), [want], rtol=1e-10)
    y = np.random.default_rng(1).dirichlet(np.ones(m))
    np.testing.assert_allclose(smoothness(np.stack([y, np.roll(y, 5)])), [smoothness(y[None])[0]] * 2, rtol=1e-12)


def test_measure_reads_the_models_distributions() -> None:
    cfg = model_config({"vocab_size": 258, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16})
    params = jax.tree.map(lambda x: 20 * x, params_lib.init(cfg, jax.random.key(0)))
    plug = TABLE["smoothness"](texts=("python-docs:in", "python-docs:pass"), tokens=24, skip=4, bin=5)
    done = plug.run(Subject(DecoderModel(cfg), params, ByteTokenizer()), lambda fraction, text: None)
    from lm.data.texts import documents

    for spec, got in zip(plug.texts, done.samples["smoothness"], strict=True):
        ids = list(documents(spec)[0].text.encode())[:24]
        logits = DecoderModel(cfg).apply(params, Inputs(np.array([ids]))).logits_BTV[0, 4:]
        want = np.mean([by_definition(np.asarray(row, np.float64)) for row in jax.nn.softmax(logits)[:2]])
        assert want > 0
        np.testing.assert_allclose(got, smoothness(jax.nn.softmax(logits)).mean(), rtol=1e-4)
    assert len(done.curves["smoothness"]["x"]) == 4


def test_ids_are_read_in_the_heads_order() -> None:
    cfg = model_config({"vocab_size": 5, "head": {"name": "fourier", "order": (2, 0, 1, 4, 3)}})
    y = np.array([[0.3, 0.1, 0.2, 0.0, 0.4]])
    np.testing.assert_array_equal(in_order(y, cfg.head), [[0.1, 0.2, 0.3, 0.4, 0.0]])
    assert in_order(y, model_config({"vocab_size": 5}).head) is y


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, r"measures\.smoothness: tokens, bin: at least 1, found 0, 16"),
        ({"skip": 256}, r"measures\.smoothness\.skip: must lie in 0 … 255, found 256"),
    ],
)
def test_mistakes_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TABLE["smoothness"](**fields)


def test_short_documents_are_refused() -> None:
    cfg = model_config({"vocab_size": 258, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16})
    subject = Subject(DecoderModel(cfg), params_lib.init(cfg, jax.random.key(0)), ByteTokenizer())
    with pytest.raises(UserError, match=r"measures\.smoothness\.tokens: 100000 asked for, document 'pass'"):
        TABLE["smoothness"](texts=("python-docs:pass",), tokens=100000).run(subject, lambda fraction, text: None)


def test_shapes_that_are_no_distributions() -> None:
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        smoothness(np.ones(5) / 5)
