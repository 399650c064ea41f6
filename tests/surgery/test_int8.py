"""Int8 weights: rounding as described, the same model to its precision, the same greedy text where it is not close."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import Params
from cases.surgery_case import SurgeryCase

from experiments.commands.generate import surgery_of
from lm import weights
from lm.config import ModelConfig, build, model_config
from lm.decoding import Generator, Sampling
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.decoder import Decoder
from lm.surgery.int8 import Int8
from lm.train.config import TrainConfig

SMALL = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_positions": 64}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 13)))


def logits(cfg: object, params: object) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: Decoder(cfg).apply({"params": p}, TOKENS).logits_BTV)(params))  # type: ignore[arg-type]


@pytest.mark.parametrize("n_in, table", [(1, False), (2, False), (1, True)])
def test_rounding_by_hand(n_in: int, table: bool) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((3, 5, 4) if n_in == 2 else (6, 5)).astype(np.float32)
    w.reshape(-1, w.shape[-1])[:, 0] = 0  # an output of zeros
    q = weights.Int8.of(jnp.asarray(w), 0, n_in, table)
    flat = w.reshape(int(np.prod(w.shape[:n_in])), -1)
    rows = flat if table else flat.T
    scale = np.abs(rows).max(1) / 127
    want = np.round(rows / np.where(scale == 0, 1, scale)[:, None]) * scale[:, None]
    want = (want if table else want.T).reshape(w.shape)
    np.testing.assert_allclose(q.dense(), want, atol=1e-6)
    assert np.abs(q.dense() - w).max() <= np.abs(rows).max() / 254 + 1e-6
    assert q.q.dtype == jnp.int8 and q.shape == w.shape
    x = jnp.asarray(rng.standard_normal((7, flat.shape[0])), jnp.float32)
    if table:
        y = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)
        np.testing.assert_allclose(weights.transposed(y, q), y @ want.T, atol=1e-4)
        ids = jnp.asarray([[0, 3], [5, 5]])
        np.testing.assert_allclose(weights.rows(q, ids), want[np.asarray(ids)], atol=1e-6)
    else:
        np.testing.assert_allclose(weights.product(x, q, n_in), x @ want.reshape(flat.shape), atol=1e-4)


@pytest.mark.parametrize("head", [{"name": "linear", "tie": True}, {"name": "linear", "tie": False}], ids=str)
def test_it_computes_with_the_rounded_model(head: dict[str, object]) -> None:
    cfg = model_config({**SMALL, "head": head})
    params = params_lib.init(cfg, jax.random.key(0))
    _, made = Int8().apply(cfg, params)
    rounded = weights.densify(made)
    for name, leaf in params_lib.names(params).items():
        matrix = name.endswith("kernel") or name == "embed"
        assert weights.special(params_lib.names(made)[name]) == matrix, name
        assert bool(jnp.array_equal(params_lib.names(rounded)[name], leaf)) != matrix
    np.testing.assert_allclose(logits(cfg, made), logits(cfg, rounded), atol=2e-5)
    # one tree per layer is the same
    apart = Int8().apply(cfg, params_lib.unstack(params))[1]
    np.testing.assert_allclose(logits(cfg, apart), logits(cfg, rounded), atol=2e-5)
    size = sum(x.nbytes for x in jax.tree.leaves(made)) / sum(x.nbytes for x in jax.tree.leaves(params))
    assert size < 0.36


def test_kept_names_stay_and_generation_reads_it() -> None:
    cfg = model_config(SMALL)
    params = params_lib.init(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: 8 * x if x.ndim >= 2 else x, params)
    _, made = Int8(keep=("embed", "*/ffn/*")).apply(cfg, params)
    kinds = {name: weights.special(leaf) for name, leaf in params_lib.names(made).items()}
    assert not kinds["embed"] and not kinds["blocks/ffn/up/kernel"] and kinds["blocks/attn/o/kernel"]
    prompts, greedy = [[3, 4, 5], [7, 8]], Sampling(temperature=0.0)
    got = Generator(cfg, made)(prompts, greedy, max_new_tokens=6)
    want = Generator(cfg, weights.densify(made))(prompts, greedy, max_new_tokens=6)
    assert [r[0].tokens for r in got] == [r[0].tokens for r in want]


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"train.surgery: int8 makes weights to read, not to train; valid: none, lora"):
        build(TrainConfig, {"surgery": "int8"}, "train")
    with pytest.raises(UserError, match="--surgery: unknown name 'lora'; valid: int8, none"):
        surgery_of("lora")


class TestInt8(SurgeryCase):
    def made(self, cfg: ModelConfig, params: Params) -> Params:
        return dict(Int8().apply(cfg, params)[1])

    def limits(self, cfg: ModelConfig, params: Params) -> dict[str, Params]:
        return {"all kept": Int8(keep=("*",)).apply(cfg, params)[1]}

    def oracle(self, name: str, weight: np.ndarray) -> np.ndarray | None:
        """A scale per output; of the table, per row. An output's inputs are the axes before its own."""
        if name == "embed":
            scale = np.abs(weight).max(1, keepdims=True) / 127
        elif name.endswith("kernel"):
            n_in = 2 if "/o/" in name else 1
            scale = np.abs(weight).max(tuple(range(1, 1 + n_in)), keepdims=True) / 127
        else:
            return None
        return np.round(weight / scale) * scale
