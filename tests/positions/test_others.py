"""ALiBi, NoPE and learned positions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lm.positions import TABLE
from lm.positions.alibi import Alibi, slopes


def test_slopes_of_a_power_of_two() -> None:
    assert slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert slopes(1) == (2.0**-8,)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 16, 20])
def test_slopes_of_bloom(n: int) -> None:
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch code")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    bias = build_alibi_tensor(torch.ones(1, 5), n, torch.float32).reshape(n, 5).numpy()
    np.testing.assert_allclose(bias[:, 1], slopes(n), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 16, 20])
def test_slopes_of_mpt(n: int) -> None:
    pytest.importorskip("torch", reason="the oracle is PyTorch code")
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bias = build_mpt_alibi_tensor(n, 5).reshape(n, 5).numpy()
    np.testing.assert_allclose(bias[:, -1] - bias[:, -2], slopes(n, "mpt"), rtol=1e-5)


def test_bias_is_minus_slope_times_distance() -> None:
    bias = Alibi().bias(jnp.asarray([5.0, 7.5]), jnp.asarray([1.0, 2.0, 5.0]), 4)
    assert bias is not None and bias.shape == (4, 2, 3)
    np.testing.assert_allclose(bias[1], -slopes(4)[1] * np.array([[4, 3, 0], [6.5, 5.5, 2.5]]))


def test_what_moves_nothing() -> None:
    x = jnp.ones((2, 3, 4))
    for name in ("nope", "alibi", "learned"):
        plug = TABLE[name]()
        assert plug.rotate(x, jnp.zeros((2, 3)), 1.0) is x
    assert TABLE["nope"]().bias(jnp.zeros(2), jnp.zeros(2), 4) is None
    assert TABLE["learned"](size=7).limit == 7
