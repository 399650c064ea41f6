"""What a chip will hold during a training step, by arithmetic: no compiler, no devices, seconds instead of minutes.

Arguments (parameters, optimizer state, batch) follow from the rules exactly. Temporaries are those of the fullest of
three moments. In the backward pass of a layer: the inputs of all layers (``model.remat``; without it, what they keep),
stacked matrices cast to the type of the arithmetic, float32 gradients of stacked layers, one layer's matrices gathered
and their gradients not yet scattered, and the layer's own activations, of which five of the feed-forward width and five
of the model width live at once in the programs that the compiler makes (read off its report for one architecture). In
the loss: layer inputs, the head gathered, its gradient, a piece of logits. At the end: all gradients, and the rows that
the embedding's is summed from, by columns, which are filled up to 128 (`lm.weights.lookup`). A mixture works on the
rows that come to its experts, with two of the model width among them; where an expert is alone on its chip, four arrays
are of the feed-forward width, for gate and up are not multiplied as one. How far all that is from the compiler:
``docs/scaling.md``.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.aot import chips
from lm.config import ModelConfig
from lm.model import params
from lm.train.config import TrainConfig
from lm.train.step import draws, initial
from lm.weights.lookup import pieces

NARROW = 5  # arrays [tokens, d_model] alive at once; those of the feed-forward width are said by its plug
LANES = 128  # to which a TPU fills up the last axis


def estimate(cfg: ModelConfig, train: TrainConfig, topology: str) -> dict[str, Any]:
    """Bytes of one chip of `topology` (``v5e:16x16``): ``state`` and ``memory`` as `certificate.certify` has them, and
    the parts of the temporaries. Raises `UserError` for what does not divide or is no slice."""
    chip, n = chips.split(topology)[0], chips.count(topology)
    layout, sizes = train.mesh, train.mesh.sizes(n)
    whole = params.abstract(cfg)
    shapes = {name: leaf.shape for name, leaf in params.names(whole).items()}
    axes = params.axes(cfg)
    layout.check({name: (s, axes[name]) for name, s in shapes.items()}, sizes)

    def cut(name: str, shape: tuple[int, ...], skip: tuple[str, ...] = ()) -> float:
        """The part of an array that a chip holds."""
        out = 1.0
        for n, spec in zip(shape, layout.spec(axes[name]), strict=False):
            over = () if spec is None else (spec,) if isinstance(spec, str) else spec
            out *= n / math.prod(sizes[a] for a in over if a not in skip)
        return out * math.prod(shape[len(axes[name]) :])

    def bytes_on_device(tree: Any) -> float:
        total = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = params.owner(path, np.shape(leaf), shapes)
            count = cut(name, leaf.shape) if name else math.prod(leaf.shape)
            total += count * jnp.dtype(leaf.dtype).itemsize
        return total

    seed = 0 if draws(cfg, train) else None
    state = jax.eval_shape(lambda p: initial(cfg, train, train.surgery.init(cfg, p, jax.random.key(0)), seed), whole)
    frozen = bytes_on_device(whole) if train.surgery.adds else 0.0
    rows = train.batch / layout.parts("batch", sizes)
    tokens = rows * train.data.seq_len / layout.parts("length", sizes)
    n_outside = layout.layout_around_stages(sizes).parts("batch", sizes) / layout.parts("batch", sizes)
    arguments = bytes_on_device(state) + frozen + 12 * tokens / n_outside
    trained = 4.0 * sum(cut(name, s) for name, s in shapes.items()) if not frozen else bytes_on_device(state["params"])
    parts = _temporaries(cfg, train, sizes, tokens / train.accumulate, cut, shapes, trained)
    if train.accumulate > 1:
        parts["sums of the parts' gradients"] = trained
    parts = {name: n for name, n in parts.items() if n}
    temporaries = sum(parts.values())
    return {
        "topology": topology,
        "chips": n,
        "mesh": sizes,
        "hbm": chips.CHIPS[chip].hbm,
        "state": {
            "parameters": bytes_on_device(state["params"]),
            "optimizer": bytes_on_device(state["opt"]),
            "frozen": frozen,
        },
        "memory": {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries},
        "temporaries": parts,
        "fits": arguments + temporaries <= chips.CHIPS[chip].hbm,
    }


def _temporaries(
    cfg: ModelConfig,
    train: TrainConfig,
    sizes: dict[str, int],
    tokens: float,
    cut: Any,
    shapes: dict[str, Any],
    trained: float,
) -> dict[str, float]:
    """Bytes of the fullest moment, by what they are for. `tokens`: of a chip in one part of a step, as stages hold
    them; `trained`: bytes of float32 gradients that a chip keeps."""
    layout, size = train.mesh, jnp.dtype(cfg.dtype).itemsize
    stages, D, V = layout.parts("layers", sizes), cfg.d_model, cfg.vocab_size / layout.parts("vocab", sizes)
    flight = layout.in_flight(stages) if stages > 1 else 1
    here, ticks = tokens / flight, flight + stages - 1  # tokens of a microbatch
    outside = tokens / (layout.layout_around_stages(sizes).parts("batch", sizes) / layout.parts("batch", sizes))
    layers = cfg.layers()
    stream = here * layout.parts("length", sizes) / layout.parts("stream", sizes)  # rows of D between layers
    adds = train.surgery.adds
    gathered = any(sizes[a] > 1 for a in layout.axes_of("embed"))
    apart = any(sizes[a] > 1 for a in layout.axes_of("batch") if a not in layout.axes_of("embed"))

    def blocks(skip: tuple[str, ...] = ()) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, shape in shapes.items():
            first = name.split("/")[0]
            if first.startswith("blocks"):
                found[first] = found.get(first, 0.0) + cut(name, shape, skip)
        return found

    held, stacked = sum(blocks().values()), "blocks" in blocks()
    # One layer's matrices, whole but for what tensor and expert axes cut.
    matrix = max(blocks(("fsdp", "data", "stage")).values()) / (cfg.n_layers if stacked else 1) * size
    wide = max(_busy(layer, train, sizes, here) for layer in layers)
    cast = held * size if stacked and cfg.param_dtype != cfg.dtype else 0.0
    grads = min(trained, 4 * held)

    kept = stream * D * size if cfg.remat else here * size * max(_inside(layer, train, sizes) for layer in layers)
    inputs = ticks * cfg.n_layers / stages * kept
    inside = ((1 if gathered else 0) + (0 if adds else 1)) * matrix + size * (wide + NARROW * here * D)
    # A pipeline adds a tick's gradients to those of earlier ticks, and has microbatches waiting, coming and going.
    belt = 3 * (tokens / flight) * math.ceil(flight / stages) * stream / here * D * size if stages > 1 else 0.0
    layer = {
        "inputs of layers": inputs if stacked else max(inputs, grads),
        "matrices in bfloat16": cast,
        "gradients of layers": grads * (2 if stages > 1 else 1) if stacked else 0.0,
        "inside a layer": inside,
        "microbatches that wait": belt,
    }
    # The head as it multiplies, twice (large programs hold it transposed too, small ones do not), its gradient of a
    # piece in float32, whole and cut, that of earlier pieces, cut; and the logits of a piece.
    piece = min(train.objective.logits_at_once or outside, outside)
    head = 2 * size * V * D + (0 if adds else 4 * V * D * (1 + (2 / layout.parts("embed", sizes))))
    loss = {
        "inputs of layers": inputs,
        "matrices in bfloat16": cast,
        "the loss": head + 4 * piece * V + NARROW * outside * D * size + belt / 3,
    }
    # The embedding's gradient: float32 rows by columns, sorted, added to a table.
    table, width = cut("embed", shapes["embed"]), layout.parts("embed", sizes)
    turned = outside * D
    if width > 1:
        each = train.data.seq_len // layout.parts("length", sizes)
        turned = outside * width / pieces(outside * width, each) * math.ceil(D / width / LANES) * LANES
    end = {
        "gradients": trained,
        "the embedding": 0.0 if adds else 4 * (2 * turned + table * (2 if apart else 1)),
    }
    return max((layer, loss, end), key=lambda moment: sum(moment.values()))


def _busy(layer: ModelConfig, train: TrainConfig, sizes: dict[str, int], tokens: float) -> float:
    """Numbers of the feed-forward layer alive at once."""
    rows, mesh = _rows(layer, train, sizes, tokens), train.mesh
    return layer.ffn.alive(layer, rows, mesh.parts("experts", sizes), mesh.parts("mlp", sizes))


def _inside(layer: ModelConfig, train: TrainConfig, sizes: dict[str, int]) -> float:
    """Numbers that a layer without `remat` keeps of a token: the stream and its norms, what its mixer keeps, and two
    arrays of the feed-forward width."""
    layout = train.mesh
    mixed = layer.mixer.between(layer, layout.parts("heads", sizes), layout.parts("kv_heads", sizes))
    wide = _rows(layer, train, sizes, 1.0) * 2 * layer.ffn.width(layer) / layout.parts("mlp", sizes)
    return 4 * layer.d_model + mixed + wide


def _rows(layer: ModelConfig, train: TrainConfig, sizes: dict[str, int], tokens: float) -> float:
    """Rows that a feed-forward layer works on: the tokens, or what comes to the experts of a chip."""
    return layer.ffn.rows(layer, tokens, train.mesh.parts("experts", sizes), train.mesh.exchange)
