"""What a chip will hold during a training step, by arithmetic: no compiler, no devices, seconds instead of minutes.

Arguments (parameters, optimizer state, batch) follow from the rules exactly. Temporaries are those of the fullest
moment, the backward pass of a layer: the inputs of all layers (``model.remat``; without it, everything inside them),
one layer's matrices gathered and their gradients not yet scattered, and the layer's own activations, of which five of
the feed-forward width and five of the model width live at once in the programs that the compiler makes (read off its
report for one architecture); or, if that is more, the loss: embedding and head gathered, the head's gradient in
float32, one piece of logits. Against the compiler: ``docs/scaling.md``.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import params
from lm.config import ModelConfig
from lm.parallel import chips
from lm.train.config import TrainConfig
from lm.train.step import draws, initial

WIDE, NARROW = 5, 5  # arrays [tokens, d_ff] and [tokens, d_model] alive at once


def estimate(cfg: ModelConfig, train: TrainConfig, topology: str) -> dict[str, Any]:
    """Bytes of one chip of `topology` (``v5e:16x16``): ``state`` and ``memory`` as `certificate.certify` has them, and
    the parts of the temporaries. Raises `UserError` for what does not divide or is no slice."""
    chip, shape = chips.split(topology)
    n = math.prod(int(side) for side in shape.split("x"))
    layout, sizes = train.mesh, train.mesh.sizes(n)
    whole = params.abstract(cfg)
    shapes = {name: leaf.shape for name, leaf in params.names(whole).items()}
    layout.check({name: (s, params.logical_of(name)) for name, s in shapes.items()}, sizes)

    def cut(name: str, shape: tuple[int, ...], skip: tuple[str, ...] = ()) -> float:
        """The part of an array that a chip holds."""
        out = 1.0
        for n, spec in zip(shape, layout.spec(params.logical_of(name)), strict=False):
            axes = () if spec is None else (spec,) if isinstance(spec, str) else spec
            out *= n / math.prod(sizes[a] for a in axes if a not in skip)
        return out * math.prod(shape[len(params.logical_of(name)) :])

    def held(tree: Any) -> float:
        total = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            parts = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
            names = ("/".join(parts[start:]) for start in range(len(parts)))
            name = next((x for x in names if shapes.get(x) == np.shape(leaf)), None)
            count = cut(name, leaf.shape) if name else math.prod(leaf.shape)
            total += count * jnp.dtype(leaf.dtype).itemsize
        return total

    seed = 0 if draws(cfg, train) else None
    state = jax.eval_shape(lambda p: initial(train.surgery.init(cfg, p, jax.random.key(0)), train, seed), whole)
    frozen = held(whole) if train.surgery.adds else 0.0
    rows = train.batch / layout.parts("batch", sizes)
    tokens = rows * train.data.seq_len / layout.parts("length", sizes)
    arguments = held(state) + frozen + 12 * tokens
    parts = _temporaries(cfg, train, sizes, tokens / train.accumulate, cut, shapes)
    if train.accumulate > 1:
        parts["gradients"] = (
            4.0 * sum(cut(name, s) for name, s in shapes.items()) if not frozen else held(state["params"])
        )
    temporaries = sum(parts.values())
    return {
        "topology": topology,
        "chips": n,
        "mesh": sizes,
        "hbm": chips.CHIPS[chip].hbm,
        "state": {"parameters": held(state["params"]), "optimizer": held(state["opt"]), "frozen": frozen},
        "memory": {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries},
        "temporaries": parts,
        "fits": arguments + temporaries <= chips.CHIPS[chip].hbm,
    }


def _temporaries(
    cfg: ModelConfig, train: TrainConfig, sizes: dict[str, int], tokens: float, cut: Any, shapes: dict[str, Any]
) -> dict[str, float]:
    """`tokens` of a chip in one part of a step. Bytes, by what they are for."""
    layout, size = train.mesh, jnp.dtype(cfg.dtype).itemsize
    stages, D = layout.parts("layers", sizes), cfg.d_model
    flight = layout.in_flight(stages) if stages > 1 else 1
    here = tokens / flight  # of one microbatch
    ticks = flight + stages - 1
    layers = cfg.layers()
    inner = layout.parts("mlp", sizes)
    wide = max(_rows(layer, train, sizes, here) * _width(layer) for layer in layers) / inner
    # A layer's matrices, whole but for what tensor and expert axes cut.
    of_layer: dict[str, float] = {}
    for name, shape in shapes.items():
        first = name.split("/")[0]
        if first.startswith("blocks"):
            stack = cfg.n_layers if first == "blocks" else 1
            of_layer[first] = of_layer.get(first, 0.0) + cut(name, shape, ("fsdp", "data", "stage")) / stack
    matrices = max(of_layer.values()) * size
    kept = D if cfg.remat else 8 * D + 4 * max(_width(layer) for layer in layers) / inner
    vocab = cfg.vocab_size / layout.parts("vocab", sizes)
    piece = min(train.objective.chunk or here, here) if hasattr(train.objective, "chunk") else here
    inside = (2 if not train.surgery.adds else 1) * matrices + size * (WIDE * wide + NARROW * here * D)
    # Embedding and head as they multiply, the head's gradient in float32 before it is summed, and a piece's logits.
    loss = (2 * size + 4) * vocab * D + 4 * piece * vocab + NARROW * here * D * size
    out = {"inputs of layers": ticks * cfg.n_layers / stages * here * kept * size}
    out["inside a layer" if inside >= loss else "the loss"] = max(inside, loss)
    return out


def _width(layer: ModelConfig) -> int:
    return int(getattr(layer.ffn, "d_expert", None) or layer.d_ff)


def _rows(layer: ModelConfig, train: TrainConfig, sizes: dict[str, int], tokens: float) -> float:
    """Rows that a feed-forward layer works on: the tokens, or what comes to the experts of a chip."""
    k = getattr(getattr(layer.ffn, "router", None), "k", None)
    if k is None:
        return tokens
    p = train.mesh.parts("experts", sizes)
    even = tokens * k
    most = even * p if train.mesh.exchange is None else min(train.mesh.exchange * even, even * p)
    if layer.ffn.capacity is not None:
        most = min(most, even * layer.ffn.capacity * (1 if layer.ffn.capacity_counts_k else 1 / k))
    return most + (tokens * layer.ffn.shared / _width(layer) if layer.ffn.shared else 0.0)
