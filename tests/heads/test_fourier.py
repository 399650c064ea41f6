"""The Fourier head against loops written from the paper's algorithm 1, closed forms and properties."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import BASE, TOKENS, gradient, logits, parameters, rms_ratio
from cases.plug_case import KindCase, PlugCase
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import merge, model_config
from lm.errors import UserError
from lm.heads.base import Targets
from lm.heads.fourier import autocorrelation, probabilities, roughness
from lm.model import params as params_lib
from lm.model.decoder import readout
from lm.model.language_model import DecoderModel
from lm.objectives.likelihood import head_loss
from lm.optimizers import TABLE as OPTIMIZERS
from lm.train.config import TrainConfig
from lm.train.step import gradients

V, D = 17, 8


def centres(m: int) -> np.ndarray:
    return np.array([-1 + (2 * j + 1) / m for j in range(m)])


def by_the_paper(a: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c_0 … c_N, density at x) of one token by explicit sums, complex128."""
    n = len(a) - 1
    c = np.zeros(n + 1, np.complex128)
    for k in range(n + 1):
        for j in range(n - k + 1):
            c[k] += a[j + k] * np.conj(a[j])
    p = np.full(len(x), 0.5)
    for i, xi in enumerate(x):
        for k in range(1, n + 1):
            p[i] += (c[k] / c[0].real * np.exp(1j * np.pi * k * xi)).real
    return c, p


def draw(n: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return scale * (rng.normal(size=n + 1) + 1j * rng.normal(size=n + 1))


def y_of(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(probabilities(jnp.asarray(a.real), jnp.asarray(a.imag), x))


@pytest.mark.parametrize("n", [0, 1, 2, 12, 40])
@pytest.mark.parametrize("m", [2, 17, 50])
def test_fast_form_is_the_papers(n: int, m: int) -> None:
    """Also where frequencies alias (N >= m), and with c_k from the transform."""
    a, x = draw(n, n + m), centres(m)
    c, p = by_the_paper(a, x)
    np.testing.assert_allclose(y_of(a, x), p / p.sum(), rtol=0, atol=1e-14)
    if n < m:
        np.testing.assert_allclose(p.sum(), m / 2, rtol=1e-12)
    with jax.enable_x64(True):
        re, im = jnp.asarray(a.real), jnp.asarray(a.imag)
        np.testing.assert_allclose(autocorrelation(re, im), c, rtol=0, atol=1e-12 * abs(c[0]))
        want = 2 * sum(2 * np.pi**2 * k**2 * abs(c[k]) ** 2 for k in range(n + 1))
        np.testing.assert_allclose(roughness(re, im), want, rtol=1e-12, atol=1e-12 * abs(c[0]) ** 2)


def test_one_frequency_has_a_closed_form() -> None:
    """a = (1, r): p(x) = 1/2 + r cos(pi x) / (1 + r^2); the regulariser is 4 pi^2 r^2."""
    r, x = 0.3, centres(20)
    want = (0.5 + r * np.cos(np.pi * x) / (1 + r**2)) / 10
    np.testing.assert_allclose(y_of(np.array([1.0, r], complex), x), want, rtol=1e-14)
    np.testing.assert_allclose(roughness(jnp.array([1.0, r]), jnp.zeros(2)), 4 * np.pi**2 * r**2, rtol=1e-6)


def test_symmetries() -> None:
    """Real a: an even density. conj(a): its mirror image. A phase or a factor changes nothing. N = 0: uniform."""
    a, x = draw(9), centres(30)
    y = y_of(a, x)
    real = y_of(a.real.astype(complex), x)
    np.testing.assert_allclose(real, real[::-1], rtol=0, atol=1e-15)
    np.testing.assert_allclose(y_of(a.conj(), x), y[::-1], rtol=0, atol=1e-15)
    for factor in (np.exp(0.7j), 1e-200, 1e150, -3.0):
        np.testing.assert_allclose(y_of(factor * a, x), y, rtol=0, atol=1e-15)
    np.testing.assert_allclose(y_of(draw(0), x), 1 / 30, rtol=1e-14)


def test_density_and_regulariser_are_integrals() -> None:
    """Over a fine grid (exact for trigonometric polynomials): the density integrates to 1, the regulariser is the
    integral of the squared derivative of |A|^2, or of p when normalized."""
    a, m = draw(7, 3), 400
    x = centres(m)
    _, p = by_the_paper(a, x)
    np.testing.assert_allclose(p.mean() * 2, 1.0, rtol=1e-13)
    assert p.min() >= -1e-15
    wave = np.exp(1j * np.pi * np.outer(np.arange(8), x))
    amplitude = a @ wave
    slope = 2 * (np.conj(amplitude) * (a @ (1j * np.pi * np.arange(8)[:, None] * wave))).real
    with jax.enable_x64(True):
        re, im = jnp.asarray(a.real), jnp.asarray(a.imag)
        np.testing.assert_allclose(roughness(re, im), 2 * (slope**2).mean(), rtol=1e-12)
        c0 = (abs(a) ** 2).sum()
        np.testing.assert_allclose(roughness(re, im, normalized=True), 2 * ((slope / 2 / c0) ** 2).mean(), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 24),
    seed=st.integers(0, 2**16),
    power=st.integers(-36, 36),
    sparse=st.floats(0, 1),
)
def test_always_a_distribution(n: int, seed: int, power: int, sparse: float) -> None:
    """float32, coefficients of any size, zeros among them: not negative, sums to 1."""
    a = draw(n, seed) * (np.random.default_rng(seed).uniform(size=n + 1) >= sparse)
    y = np.asarray(probabilities(*(jnp.asarray(p * 10.0**power, jnp.float32) for p in (a.real, a.imag)), centres(V)))
    assert np.isfinite(y).all() and (y >= 0).all()
    assert not a.any() or abs(float(y.sum(dtype=np.float64)) - 1) < 2e-6


def test_no_coefficients_at_all() -> None:
    """a = 0 has no density: the logits are all equal, and the gradient is finite."""

    def total(re: Any) -> Any:
        return jnp.log(probabilities(re, jnp.zeros(4), centres(V)) + 1e-5)[2]

    value, slope = jax.value_and_grad(total)(jnp.zeros(4))
    np.testing.assert_allclose(value, np.log(1e-5), rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("n", [3, 25])
def test_gradient(n: int) -> None:
    """Against central differences in float64, through the logits and both regularisers."""
    with jax.enable_x64(True):
        a, x, pick = draw(n, 5), centres(V), np.random.default_rng(1).normal(size=V)
        flat = jnp.asarray(np.concatenate([a.real, a.imag]))

        def f(flat: Any) -> Any:
            re, im = jnp.split(flat, 2)
            y = jnp.log(probabilities(re, im, x) + 1e-5) @ pick
            return y + 1e-4 * roughness(re, im) + roughness(re, im, normalized=True) * 1e-2

        got = np.asarray(jax.grad(f)(flat))
        for i in range(len(flat)):
            step = jnp.zeros_like(flat).at[i].set(1e-6)
            assert abs(got[i] - (f(flat + step) - f(flat - step)) / 2e-6) <= 1e-6 * max(1.0, np.abs(got).max())


def head(**fields: Any) -> Any:
    return model_config({"vocab_size": V, "d_model": D, "n_heads": 2, "head": {"name": "fourier", **fields}})


def test_the_layer_is_the_papers() -> None:
    """First half real parts, then imaginary parts; logits log(y + eps), whose softmax is (y + eps) / (1 + m eps)."""
    cfg, rng = head(frequencies=5), np.random.default_rng(0)
    kernel, bias, h = rng.normal(size=(D, 12)), rng.normal(size=12), rng.normal(size=(3, D))
    params = {
        "embed": jnp.zeros((V, D)),
        "head": {"coefficients": jnp.asarray(kernel, jnp.float32), "coefficients_bias": jnp.asarray(bias, jnp.float32)},
    }
    got = np.asarray(readout(cfg, params, jnp.asarray(h, jnp.float32)))
    for row, flat in zip(got, h @ kernel + bias, strict=True):
        _, p = by_the_paper(flat[:6] + 1j * flat[6:], centres(V))
        y = p / p.sum()
        np.testing.assert_allclose(row, np.log(y + 1e-5), rtol=2e-5)
        np.testing.assert_allclose(jax.nn.softmax(row), (y + 1e-5) / (1 + V * 1e-5), rtol=2e-5, atol=1e-8)


def test_initialisation() -> None:
    """Uniform in +-1/sqrt(D), divided by 100 (or by what the config says); 2 (N + 1) columns and a bias."""
    for scales in ((1e-2, 1e-2), (1e-3, 1e-1)):
        cfg = merge(head(frequencies=40, kernel_scale=scales[0], bias_scale=scales[1]), {"d_model": 64}, "model")
        tree = params_lib.init(cfg, jax.random.key(0))["head"]
        assert tree["coefficients"].shape == (64, 82) and tree["coefficients_bias"].shape == (82,)
        for leaf, scale in zip((tree["coefficients"], tree["coefficients_bias"]), scales, strict=True):
            bound = scale / 8
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
            assert abs(float(leaf.std()) / (bound / np.sqrt(3)) - 1) < 0.15


def test_places_of_bins() -> None:
    """A reordering permutes the distribution; centres of one's own are where the density is read."""
    rng = np.random.default_rng(2)
    order = rng.permutation(V)
    params = params_lib.init(head(frequencies=4), jax.random.key(1))
    h = jnp.asarray(rng.normal(size=(2, D)), jnp.float32)
    plain = np.asarray(readout(head(frequencies=4), params, h))
    moved = np.asarray(readout(head(frequencies=4, order=tuple(int(i) for i in order)), params, h))
    np.testing.assert_allclose(moved, plain[:, order], rtol=1e-6)
    shuffled = np.asarray(readout(head(frequencies=4, shuffle=3), params, h))
    assert not np.allclose(shuffled, plain)
    np.testing.assert_allclose(np.sort(shuffled), np.sort(plain), rtol=1e-6)
    own = np.asarray(readout(head(frequencies=4, centres=tuple(centres(V)[::-1])), params, h))
    np.testing.assert_allclose(own, plain[:, ::-1], rtol=1e-6)


def test_bfloat16_is_stable() -> None:
    """Everything behind the hidden state is float32: the distributions err by its rounding alone, and no logit is
    below log(eps)."""
    cfg = head(frequencies=16)
    params = jax.tree.map(lambda x: 100 * x, params_lib.init(cfg, jax.random.key(3)))
    h = jax.random.normal(jax.random.key(4), (64, D)).astype(jnp.bfloat16)
    half, full = readout(cfg, params, h), readout(cfg, params, h.astype(jnp.float32))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, full)
    assert float(half.min()) >= np.log(1e-5) - 1e-4
    np.testing.assert_allclose(np.exp(np.asarray(half, np.float64)).sum(-1), 1 + V * 1e-5, rtol=1e-5)


@pytest.mark.parametrize("reg_on", ["raw", "normalized"])
def test_regulariser_reaches_the_training_loss(reg_on: str) -> None:
    """loss = cross-entropy + gamma * regulariser of the weighted tokens, in pieces or whole; `nll` is without."""
    rng = np.random.default_rng(6)
    hidden = jnp.asarray(rng.normal(size=(2, 9, D)), jnp.float32)
    targets, weights = jnp.asarray(rng.integers(0, V, (2, 9))), jnp.asarray(rng.choice([0.0, 1.0], (2, 9)), jnp.float32)
    plain, cfg = head(frequencies=5), head(frequencies=5, gamma=0.02, reg_on=reg_on)
    params = jax.tree.map(lambda x: 100 * x, params_lib.init(cfg, jax.random.key(5)))
    base, base_sums = head_loss(DecoderModel(plain), params, Targets(hidden, targets, weights))
    re, im = cfg.head.module(cfg).apply({"params": params["head"]}, hidden, method="coefficients")
    a = np.asarray(re, np.float64) + 1j * np.asarray(im, np.float64)
    want = 0.0
    for at in np.ndindex(2, 9):
        c, _ = by_the_paper(a[at], centres(V))
        c = c if reg_on == "raw" else c / (2 * c[0].real)
        want += float(weights[at]) * 0.02 * 2 * sum(2 * np.pi**2 * k**2 * abs(c[k]) ** 2 for k in range(6))
    for chunk in (4, 0):
        loss, sums = head_loss(DecoderModel(cfg), params, Targets(hidden, targets, weights, chunk=chunk))
        np.testing.assert_allclose(sums["aux_fourier"], want, rtol=1e-5)
        np.testing.assert_allclose(loss, base + want, rtol=1e-5)
        np.testing.assert_allclose(sums["nll"], base_sums["nll"], rtol=1e-6)
    assert "aux_fourier" not in base_sums


def test_training_step_sees_the_regulariser() -> None:
    """Also when the batch is accumulated in parts; the gradient is that of the sum."""
    cfg = head(frequencies=5, gamma=0.05)
    tokens = np.random.default_rng(7).integers(0, V, (4, 7))
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones((4, 6), jnp.float32),
    }
    params = jax.tree.map(lambda x: 30 * x if x.ndim <= 2 else x, params_lib.init(cfg, jax.random.key(8)))
    whole, one = jax.jit(lambda p: gradients(cfg, TrainConfig(batch=4), p, batch))(params)
    parts, two = jax.jit(lambda p: gradients(cfg, TrainConfig(batch=4, accumulate=2), p, batch))(params)
    assert float(one["aux_fourier"]) > 0
    np.testing.assert_allclose(one["loss"], (one["nll"] + one["aux_fourier"]) / 24, rtol=1e-5)
    np.testing.assert_allclose(two["aux_fourier"], one["aux_fourier"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert rms_ratio(a, b) < 1e-4 if float(jnp.abs(b).max()) else not a.any()
    off, _ = jax.jit(lambda p: gradients(head(frequencies=5), TrainConfig(batch=4), p, batch))(params)
    assert rms_ratio(whole["head"]["coefficients"], off["head"]["coefficients"]) > 1e-3


class TestFourier(KindCase):
    # A large epsilon, for gradients that float32 can tell from rounding: log(y + 1e-5) is steep where y is nearly 0.
    change = {"head": {"name": "fourier", "frequencies": 9, "epsilon": 1e-2}}
    training_free = False


class TestMixture(PlugCase):
    change = {"head": {"name": "mixture", "components": 3, "epsilon": 0.1}}
    training_free = False

    @property
    def params(self) -> Any:
        """Wider than one bin, for the same reason."""
        tree = parameters(self.cfg)
        return {**tree, "head": {**tree["head"], "spread": np.asarray(tree["head"]["spread"]) + np.float32(3.0)}}


def test_one_line_replaces_the_head() -> None:
    """Same trunk, same hidden states, another distribution; every optimizer takes its parameters."""
    cfg = merge(BASE, {"head": {"name": "fourier"}}, "model")
    tree = parameters(cfg)
    assert set(tree) - set(parameters(BASE)) == {"head"}
    np.testing.assert_allclose(np.exp(logits(cfg, tree, tokens_BT=TOKENS)).sum(-1), 1 + 61e-5, rtol=1e-5)
    (value, _), grad = gradient(cfg)(tree)
    assert np.isfinite(value)
    for optimizer in OPTIMIZERS.values():
        direction = optimizer().direction(params_lib.axes(cfg))
        updates, _ = jax.jit(lambda g, t, d=direction: d.update(g, d.init(t), t))(grad, tree)
        assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_mixture_head_is_its_density() -> None:
    """log of the sum of Gaussians at the centres, equal weights or weights of its own."""
    rng = np.random.default_rng(9)
    x, h = centres(V), rng.normal(size=(4, D))
    for conditional, columns in ((True, 6), (False, 2)):
        fields = {"name": "mixture", "components": 2, "conditional": conditional}
        cfg = model_config({"vocab_size": V, "d_model": D, "n_heads": 2, "head": fields})
        tree = params_lib.init(cfg, jax.random.key(0))
        kernel, bias = rng.normal(size=(D, columns)), rng.normal(size=columns)
        spread = np.array([-1.0, 0.5])
        tree["head"] = {k: jnp.asarray(v, jnp.float32) for k, v in zip(
            ("mixture", "mixture_bias", "spread"), (kernel, bias, spread), strict=True)}  # fmt: skip
        got = np.asarray(readout(cfg, tree, jnp.asarray(h, jnp.float32)))
        flat = h @ kernel + bias
        for row, f in zip(got, flat, strict=True):
            raw = spread + f[2:4] if conditional else spread
            s = np.log1p(np.exp(raw)) + 1e-4
            w = np.exp(f[4:]) / np.exp(f[4:]).sum() if conditional else np.array([0.5, 0.5])
            gauss = np.exp(-0.5 * ((x[:, None] - np.tanh(f[:2])) / s) ** 2) / (s * np.sqrt(2 * np.pi))
            np.testing.assert_allclose(row, np.log(gauss @ w + 1e-5), rtol=1e-4, atol=1e-4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"frequencies": -1}, r"model\.head\.frequencies: must be 0 or more, found -1"),
    ({"frequencies": 2.5}, r"model\.head\.frequencies: expected int, found 2\.5"),
    ({"frequency": 3}, r"model\.head\.frequency: unknown key \(did you mean 'frequencies'\?\)"),
    ({"tie": True}, r"model\.head\.tie: unknown key"),
    ({"gamma": -1e-6}, r"model\.head\.gamma: .*found -1e-06"),
    ({"gamma": float("nan")}, r"model\.head\.gamma: .*found nan"),
    ({"epsilon": 0.0}, r"model\.head\.epsilon: .*found 0\.0"),
    ({"reg_on": "normalised"}, r"model\.head\.reg_on: unknown name 'normalised' \(did you mean 'normalized'\?\)"),
    ({"kernel_scale": 0.0}, r"model\.head\.kernel_scale: .*found 0\.0"),
    ({"order": (0, 1, 1)}, r"model\.head\.order: found \(0, 1, 1\); valid: every place from 0 to 2 once"),
    ({"order": (1, 0)}, r"model\.head\.order: 2 bins, but model\.vocab_size = 17 ids"),
    ({"centres": (-1.0, 0.0, 1.0)}, r"model\.head\.centres: 3 bins, but model\.vocab_size = 17 ids"),
    ({"centres": (0.0, 2.0)}, r"model\.head\.centres: .*valid: numbers in \[-1, 1\]"),
    ({"centres": (0.5, 0.5)}, r"model\.head\.centres: .*no centre twice"),
    ({"shuffle": -2}, r"model\.head\.shuffle: .*found -2"),
    ({"shuffle": 1, "order": (0,)}, r"model\.head: order, centres and shuffle say the same"),
    ({"name": "fourrier"}, r"model\.head\.name: unknown name 'fourrier' \(did you mean 'fourier'\?\)"),
    ({"name": "mixture", "components": 0}, r"model\.head\.components: must be at least 1, found 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "")
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        head(**fields)


def test_one_bin_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size: 1 bins make no distribution"):
        model_config({"vocab_size": 1, "head": "fourier"})


def test_the_normalized_regulariser_is_the_same_at_every_scale() -> None:
    """Value, and the gradient over the scale, also where squares of squares leave float32."""
    rng = np.random.default_rng(3)
    re, im = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(2))
    fn = jax.value_and_grad(lambda re, im: roughness(re, im, normalized=True), argnums=(0, 1))
    want, grads = fn(re, im)
    assert float(want) > 1
    for scale in (1e-18, 1e-9, 1e9, 1e18):
        got, scaled = fn(re * scale, im * scale)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for a, b in zip(scaled, grads, strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float64) * scale, b, rtol=1e-3, atol=1e-3 * float(want))
    assert float(fn(0 * re, 0 * im)[0]) == 0
