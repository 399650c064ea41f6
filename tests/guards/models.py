"""The models of the guarded programs, and how the present code runs them: the one file that follows its API."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import caches
from lm.config import ModelConfig, build, merge, model_config
from lm.decoding.placement import Placement as Serving
from lm.decoding.sampling import Sampling
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.sharding import Layout
from lm.train import step
from lm.train.config import TrainConfig
from lm.train.placement import Placement

T = 44
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, T)), jnp.int32)
BASE: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_positions": 32,
    "attention": {"name": "softmax", "backend": "dense", "block_q": 16, "block_k": 12},
}
BLOCKED = {"attention": {"backend": "blocked"}}
CHANGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "blocked": BLOCKED,
    "pallas": {"attention": {"backend": "pallas"}, "n_layers": 1},
    "auto": {"attention": {"backend": "auto"}},
    "bfloat16": {**BLOCKED, "dtype": "bfloat16"},
    "remat, unrolled": {"scan_layers": False, "remat": True},
    "streaming": {**BLOCKED, "pattern": {"name": "streaming", "window": 7, "sinks": 3}},
    "lm_infinite": {
        **BLOCKED,
        "pattern": {
            **{"name": "lm_infinite", "window": 7, "sinks": 3, "ceiling": 7.0},
            **{"top_k": 4, "top_k_from_layer": 1, "top_k_queries": None},
        },
    },
    "longheads": {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 20}},
    "alibi": {"positions": {"name": "alibi"}, "pattern": {"name": "sliding_window", "window": 9}},
    "dynamic": {"positions": {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}}},
    "neox": {
        "positions": {"name": "rope", "fraction": 0.5},
        "norm": {"name": "layernorm"},
        "ffn": {"name": "gelu"},
        "parallel_residual": True,
        "attention": {"qk_norm": True, "softcap": 20.0, "qkv_bias": True, "out_bias": True},
        "head": {"name": "linear", "tie": False, "softcap": 30.0},
    },
    "gpt2": {
        "positions": {"name": "learned", "size": 48},
        "norm": {"name": "layernorm"},
        "ffn": {"name": "gelu_tanh", "bias": True},
        "embed_scale": 2.0,
    },
    "moe": {"ffn": {"name": "moe", "experts": 4, "d_expert": 16, "shared": 16, "every": 2}},
    "fourier": {"head": {"name": "fourier", "frequencies": 4}},
    "mixture": {"head": {"name": "mixture"}},
}


@functools.cache
def model(name: str) -> ModelConfig:
    return merge(model_config(BASE), CHANGES[name], "model")


@functools.cache
def params(cfg: ModelConfig) -> Any:
    """Numbers that no code draws: wide enough that attention is far from uniform."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), x.dtype), params_lib.abstract(cfg))


def logits(cfg: ModelConfig, params: Any, tokens: Any, **inputs: Any) -> Any:
    return DecoderModel(cfg).apply(params, Inputs(tokens, **inputs)).logits_BTV


def decoded(cfg: ModelConfig) -> np.ndarray:
    """Logits of a prompt of 13 tokens, a piece of 13 and single tokens, through the cache."""
    run = jax.jit(lambda p, t, i, c: _cached(cfg, p, t, i, c))
    cache, at, out = caches.init(cfg, 2, T), 0, []
    for n in (13, 13, *[1] * (T - 26)):
        index = jnp.broadcast_to(at + jnp.arange(n, dtype=jnp.int32), (2, n))
        found, cache = run(params(cfg), TOKENS[:, at : at + n], index, cache)
        out.append(np.asarray(found, np.float32))
        at += n
    return np.concatenate(out, axis=1)


def _cached(cfg: ModelConfig, params: Any, tokens: Any, index: Any, cache: Any) -> Any:
    out = DecoderModel(cfg).apply(params, Inputs(tokens, index_BT=index), cache)
    return out.logits_BTV, out.cache


SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32, "max_positions": 16}
TRAINED: dict[str, dict[str, Any]] = {
    "dense": {**SIZES, "n_kv_heads": 2, "remat": True},
    "moe": {**SIZES, "ffn": {"name": "moe", "experts": 4, "d_expert": 16, "shared": 16, "router_z_loss": 1e-3}},
    "deepseek": {**SIZES, "ffn": {"name": "moe", "experts": 4, "d_expert": 16, "router": {"name": "deepseek_v3"}}},
}
MESHES: dict[str, dict[str, Any]] = {
    "1 device": {"data": 1},
    "fsdp": {"fsdp": 8, "data": 1},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
    "stage x tensor": {"data": 2, "stage": 2, "tensor": 2, "microbatches": 2},
    "expert": {"expert": 4, "data": 2},
}
STEPS = [
    *(("dense", mesh, "adamw", "none") for mesh in MESHES if mesh != "expert"),
    ("moe", "1 device", "muon", "none"),
    ("moe", "expert", "adamw", "none"),
    ("deepseek", "1 device", "sgd_sai", "none"),
    ("dense", "fsdp", "adafactor", "none"),
    ("dense", "1 device", "adamw", "lora"),
    ("dense", "1 device", "lion", "augmented"),
]


def steps() -> dict[str, Any]:
    """Lowered: training steps on one device and on eight, the two programs of generation."""
    out = {}
    for name, mesh, optimizer, special in STEPS:
        cfg = model_config(TRAINED[name])
        settings = {"batch": 16, "accumulate": 2, "data": {"seq_len": 8}, "optimizer": optimizer, "mesh": MESHES[mesh]}
        settings |= {"surgery": {"name": "lora", "dropout": 0.1}} if special == "lora" else {}
        settings |= {"augmentation": "e2_llm"} if special == "augmented" else {}
        train = build(TrainConfig, settings, "train")
        lowered = lowered_step(cfg, train, jax.devices()[: 1 if mesh == "1 device" else 8])
        out[f"step {name}, {mesh}, {optimizer}, {special}"] = lowered
    for name in ("dense", "streaming", "longheads"):
        place = Serving(model(name), Layout(data=1), 2, 64, jax.devices()[:1])
        out[f"one token {name}"] = place.decode(Sampling(temperature=0.0))
        out[f"prompt {name}"] = place.read(16, True)
    return out


def lowered_step(cfg: ModelConfig, train: TrainConfig, devices: Any) -> Any:
    place = Placement(cfg, train, devices)
    whole = params_lib.abstract(cfg)
    seed = 0 if step.draws(cfg, train) else None
    fresh = lambda w: step.initial(cfg, train, train.surgery.init(cfg, w, jax.random.key(0)), seed)  # noqa: E731

    def placed(tree: Any) -> Any:
        where = place.shardings(tree)
        return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), tree, where)

    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    shape = (train.batch, train.data.seq_len)
    rows = {k: jax.ShapeDtypeStruct(shape, kind, sharding=place.rows) for k, kind in kinds.items()}
    beside = step.Beside(placed(whole) if train.surgery.adds else None)
    return place.lower(placed(jax.eval_shape(fresh, whole)), rows, beside)
