"""What a head can learn of a density: a small network with the subject's head, trained on data of a known density."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import lm.measures.tasks.density_tasks as tasks
from lm.config import ModelConfig
from lm.errors import UserError
from lm.heads.base import Head, Targets
from lm.measures.base import Measure, Measured, Progress, Subject
from lm.measures.language.smoothness import in_order, smoothness
from lm.model.decoder import readout
from lm.model.language_model import DecoderModel
from lm.objectives.likelihood import head_loss
from lm.weights.project import uniform

_TIED = (
    "measures.conditional_density: the head reads the embedding table, and this network has none; valid: "
    "model.head.tie = False"
)


@dataclass(frozen=True)
class ConditionalDensity(Measure):
    """The synthetic study of arXiv 2410.22269, section 3: ReLU layers of widths `hidden` and the subject's head learn
    z's bin from the bins of x and y (`samples` triples of `density_tasks`, a fifth of them kept for testing).
    Adam; the head's auxiliary losses count. Of the subject only ``model.head`` is read: nothing else need be trained.

    `frequencies`: a head that has that field is also trained with each of these (metrics ``kl@N``, ``smoothness@N``);
    the curves run over them, level for other heads. With `truncated` nothing is trained: smoothness of the true density
    itself, its Fourier series cut after N terms, which is what the paper's theorem on smoothness is about.

    Samples, one per seed: ``kl``, KL divergence of the true distribution over bins from the learned one, nats, mean
    over test rows; ``smoothness`` (`lm.measures.language.smoothness`), and ``true_smoothness``, the true ones' own.
    """

    task: Literal["gaussian", "gmm2", "beta"] = "gaussian"
    frequencies: tuple[int, ...] = ()
    truncated: bool = False
    bins: int = 50
    samples: int = 5000
    epochs: int = 500
    batch: int = 32
    learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (64, 32)

    @property
    def untrained(self) -> bool:
        return True

    def __post_init__(self) -> None:
        sizes = {"bins": self.bins - 1, "samples": self.samples, "epochs": self.epochs, "batch": self.batch}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"measures.conditional_density.{name}: too small, found {vars(self)[name]}")
        if self.batch > self.samples * 4 // 5:
            raise UserError(
                f"measures.conditional_density.batch: {self.batch} rows, {self.samples * 4 // 5} are trained on; "
                "valid: a smaller batch or more samples"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise UserError(f"measures.conditional_density.hidden: found {self.hidden}; valid: one or more widths")
        if any(n < 1 for n in self.frequencies):
            raise UserError(f"measures.conditional_density.frequencies: each at least 1, found {self.frequencies}")

    def cost(self, cfg: ModelConfig) -> float:
        runs = 1 + (len(self.frequencies) if cfg.head.resolution is not None else 0)
        return 1.0 if self.truncated else 0.3 * runs * self.epochs * self.samples

    def check(self, subject: Subject, trains: bool) -> None:
        if not self.truncated and subject.config.head.reads_embedding:
            raise UserError(_TIED)

    def run(self, subject: Subject, progress: Progress) -> Measured:
        rng = np.random.default_rng(subject.seed)
        xy, z = tasks.sample(self.task, self.samples, rng)
        order = rng.permutation(self.samples)
        n = self.samples * 4 // 5
        true = tasks.pmf(self.task, xy[order[n:]], self.bins)
        samples = {"true_smoothness": [float(smoothness(true).mean())]}
        head = subject.config.head
        own = head.resolution
        points: dict[int | None, dict[str, float]] = {}
        if self.truncated:
            for N in self.frequencies:
                cut = tasks.truncated(self.task, xy[order[n:]], self.bins, N)
                points[N] = {"smoothness": float(smoothness(cut).mean())}
        else:
            todo = list(dict.fromkeys([own, *(self.frequencies if own is not None else ())]))
            for i, number in enumerate(todo):
                progress(i / len(todo), self.task if number is None else f"{self.task}, {number} frequencies")
                plug = head if number is None or number == own else head.at_resolution(number)
                q = self._learn(plug, subject.seed, xy[order], z[order], n)
                kl = np.where(true > 0, true * (np.log(np.maximum(true, 1e-300)) - np.log(q + 1e-10)), 0.0).sum(-1)
                s = smoothness(in_order(q, plug))
                points[number] = {"kl": float(kl.mean()), "smoothness": float(s.mean())}
            samples |= {name: [value] for name, value in points[own].items()}
        curves: dict[str, Any] = {}
        for name, label in (("kl", "KL from the true distribution, nats"), ("smoothness", "s(y), smaller is smoother")):
            ys = [points.get(N, points.get(None, {})).get(name) for N in self.frequencies]
            samples |= {f"{name}@{N}": [points[N][name]] for N in self.frequencies if name in points.get(N, {})}
            if ys and None not in ys:
                curves[name] = {"x": list(self.frequencies), "y": ys, "xlabel": "frequencies N", "ylabel": label}
        return Measured(samples, curves, {"task": self.task, "trained on": n, "tested on": self.samples - n})

    def _learn(self, head: Head, seed: int, xy: np.ndarray, z: np.ndarray, n: int) -> np.ndarray:
        """The learned distributions for the test rows, float64 ``[rows, bins]``."""
        if head.reads_embedding:
            raise UserError(_TIED)
        width = self.hidden[-1]
        cfg = ModelConfig(
            vocab_size=self.bins,
            d_model=width,
            n_heads=1,
            head=head,
            init_std=(3 * width) ** -0.5,  # the deviation of the uniform start that the other layers have
        )
        inputs, targets = tasks.quantise(xy, self.bins).astype(np.float32), tasks.quantise(z, self.bins)
        args = (jnp.asarray(x) for x in (inputs[:n], targets[:n], inputs[n:]))
        same = dataclasses.replace(self, task="gaussian", frequencies=())  # one program for all tasks
        return np.asarray(_learner(same, cfg)(jax.random.key(seed), *args), np.float64)


@functools.lru_cache(maxsize=32)
def _learner(plug: ConditionalDensity, cfg: ModelConfig) -> Any:
    """Jitted ``(key, inputs, targets, test inputs) -> distributions``: the whole training is one program."""
    tx = optax.adam(plug.learning_rate)
    sizes = (2, *plug.hidden)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 2 * len(sizes))
        layers = [
            {
                "kernel": uniform(a**-0.5)(keys[2 * i], (a, b)),
                "bias": uniform(a**-0.5)(keys[2 * i + 1], (b,)),
            }
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        ]
        table = jnp.zeros((cfg.vocab_size, cfg.d_model))
        head = dict(cfg.head.module(cfg).init(keys[-1], jnp.zeros((1, cfg.d_model)), table))
        return {"layers": layers, "head": head.get("params", {})}

    def trunk(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x

    def with_table(params: Any) -> Any:
        return {"head": params["head"], "embed": jnp.zeros((cfg.vocab_size, cfg.d_model))}

    def loss(params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        ones = jnp.ones((1, len(target)))
        over = Targets(trunk(params, x)[None], target[None], ones, chunk=0)
        return head_loss(DecoderModel(cfg), with_table(params), over)[0] / len(target)

    def learn(key: jax.Array, x: jax.Array, target: jax.Array, test: jax.Array) -> jax.Array:
        start, shuffles = jax.random.split(key)
        params = init(start)
        steps = len(x) // plug.batch

        def step(state: tuple[Any, Any], rows: jax.Array) -> tuple[Any, None]:
            params, opt = state
            grads = jax.grad(loss)(params, x[rows], target[rows])
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), None

        def epoch(state: tuple[Any, Any], key: jax.Array) -> tuple[Any, None]:
            rows = jax.random.permutation(key, len(x))[: steps * plug.batch].reshape(steps, plug.batch)
            return jax.lax.scan(step, state, rows)

        (params, _), _ = jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(shuffles, plug.epochs))
        return jax.nn.softmax(readout(cfg, with_table(params), trunk(params, test)))

    return jax.jit(learn)


def scaling_law(frequencies: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """The least-squares fit of ``s(N) = C1 - C2 / N^(2t - 1)`` (theorem 3.3: coefficients that decay as 1/k^t): ``c1``,
    ``c2``, ``t`` (searched in [1, 6]) and ``r2``, the share of the variance it explains."""
    N, s = np.asarray(frequencies, np.float64), np.asarray(values, np.float64)
    best: dict[str, float] = {}
    for t in np.linspace(1.0, 6.0, 501):
        A = np.stack([np.ones_like(N), -(N ** (1.0 - 2.0 * t))], 1)
        (c1, c2), *_ = np.linalg.lstsq(A, s, rcond=None)
        r2 = 1.0 - float(((A @ [c1, c2] - s) ** 2).sum()) / max(float(((s - s.mean()) ** 2).sum()), 1e-30)
        if not best or r2 > best["r2"]:
            best = {"c1": float(c1), "c2": float(c2), "t": float(t), "r2": r2}
    return best
