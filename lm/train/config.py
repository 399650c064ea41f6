"""What determines a training run, checked before any array exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lm.config import ModelConfig, to_dict
from lm.errors import LARGEST, UserError, divisors, unknown
from lm.model import params
from lm.objectives.base import Objective
from lm.optimizers.base import Optimizer
from lm.optimizers.schedules import Schedule
from lm.plug import bounded, check_bounds, socket, table
from lm.positions.augmentation import Augmentation
from lm.sharding.layout import Layout
from lm.surgery.base import Surgery
from lm.trackers.base import Tracker
from lm.trackers.tensorboard import TensorBoard
from lm.train.samples import Samples


class Frozen(dict[str, str]):
    """A mapping that can be hashed, because nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@dataclass(frozen=True)
class DataConfig:
    """`texts`: specs of `lm.data.texts`, mixed by `weights` (one each; empty = by their numbers of rows).

    `tokenizer`: ``bytes``, ``bpe:SIZE`` (trained on the texts), a ``tokenizer.json``, a SentencePiece model, or ``""``:
    the checkpoint's own. `seq_len`: tokens per row. `packing`: ``concat`` cuts one stream of documents, ``best_fit``
    keeps pieces whole. `held_out`: fraction of documents never trained on, chosen by `split_seed`. `kind`: ``text``, or
    ``chat`` for rows with ``messages``. Of such, `template` is how they become text, ``""`` for the checkpoint's own
    template, else one of its names, ``chatml``, or a ``.jinja`` file; `learn`: the assistant's ``answers`` alone, or
    ``all``; `overlong`: what becomes of more than seq_len + 1 tokens: ``split`` into pieces that do not see each other,
    ``truncate``, or ``drop`` (both with ``best_fit``, since ``concat`` cuts conversations of any length).
    """

    texts: tuple[str, ...] = ("kjv",)
    weights: tuple[float, ...] = ()
    tokenizer: str = "bpe:4096"
    seq_len: int = bounded(256, at_least=2)
    packing: Literal["concat", "best_fit"] = "concat"
    held_out: float = 0.05
    split_seed: int = bounded(0, at_least=-LARGEST, at_most=LARGEST)  # of a hash, which takes any number
    kind: Literal["text", "chat"] = field(default="text", metadata={"later": True})
    template: str = field(default="", metadata={"later": True})
    learn: Literal["answers", "all"] = field(default="answers", metadata={"later": True})
    overlong: Literal["split", "truncate", "drop"] = field(default="split", metadata={"later": True})

    def __post_init__(self) -> None:
        check_bounds(self, "train.data")
        if not self.texts:
            raise UserError("train.data.texts: is empty; valid: one or more texts, python -m lm.data.texts lists them")
        of_chat = (
            ("template", self.template, ""),
            ("learn", self.learn, "answers"),
            ("overlong", self.overlong, "split"),
        )
        for name, value, default in of_chat:
            if value != default and self.kind != "chat":
                raise UserError(f"train.data.{name}: {value!r} is for train.data.kind = chat, found {self.kind}")
        if self.overlong != "split" and self.packing != "best_fit":
            raise UserError(
                f"train.data.overlong: {self.overlong!r} keeps conversations whole, but train.data.packing = "
                f"{self.packing} cuts them; valid: packing = best_fit, or overlong = split"
            )
        if not 0 <= self.held_out < 1:
            raise UserError(f"train.data.held_out: must lie in [0, 1), found {self.held_out}")
        if self.weights and len(self.weights) != len(self.texts):
            raise UserError(
                f"train.data.weights: {len(self.weights)} weights for {len(self.texts)} texts; valid: one each, or none"
            )
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise UserError(f"train.data.weights: found {self.weights}; valid: numbers from 0 on, not all 0")


@dataclass(frozen=True)
class TrainConfig:
    """`batch`: rows per step over all devices and accumulation steps; `accumulate`: parts it is computed in.

    `surgery`: what is trained, all parameters (``none``) or adapters to them. `augmentation`: positions of rows while
    training. `models`: frozen models that the objective asks for, name -> checkpoint or ``arm:NAME``. `clip`: largest
    global gradient norm, None = any.

    Evaluations of `eval_rows` held-out rows come before the first step, every `eval_every` steps (0 = never), and over
    all held-out rows (at most `final_rows`) at the end. Checkpoints come every `save_every` steps and at the end; the
    newest `keep_last` stay, and every multiple of `keep_every` (0 = none). `max_skipped`: as many non-finite steps in a
    row end the run. `tracker`: who is told of the numbers beside ``metrics.jsonl``; `tensorboard`: that one too.
    `samples`: what the model writes meanwhile. `profile`: (first, last) step of a profiler window. `mesh`: how state
    and batches lie on the devices; the result does not depend on it beyond the order of additions (but for
    ``mesh.exchange``).
    """

    steps: int = bounded(1000, at_least=1)
    batch: int = bounded(16, at_least=1)
    accumulate: int = bounded(1, at_least=1)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = socket("lm.objectives", "causal")
    optimizer: Optimizer = socket("lm.optimizers", "adamw")
    surgery: Surgery = socket("lm.surgery", "none")
    augmentation: Augmentation = socket("lm.positions.augmentation", "own")
    schedule: Schedule = socket("lm.optimizers.schedules", "cosine")
    mesh: Layout = field(default_factory=Layout)
    models: Mapping[str, str] = field(default_factory=dict, metadata={"later": True})
    clip: float | None = 1.0
    eval_every: int = bounded(100, at_least=0)
    eval_rows: int = bounded(64, at_least=1)
    final_rows: int = bounded(4096, at_least=1)
    save_every: int = bounded(200, at_least=1)
    keep_last: int = bounded(2, at_least=1)
    keep_every: int = bounded(0, at_least=0)
    max_skipped: int = bounded(10, at_least=1)
    log_every: int = bounded(1, at_least=1)
    tensorboard: bool = False
    tracker: Tracker = socket("lm.trackers", "none", later=True)
    samples: Samples = field(default_factory=Samples, metadata={"later": True})
    profile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, "train")
        if self.batch % self.accumulate:
            raise UserError(
                f"train.accumulate: {self.accumulate} does not divide train.batch = {self.batch}; valid: "
                f"{divisors(self.batch)}"
            )
        if not self.surgery.trains:
            trainable = [name for name, plug in table("lm.surgery").items() if plug().trains]
            name = to_dict(self)["surgery"]["name"]
            raise UserError(f"train.surgery: {name} makes weights to read, not to train; valid: {', '.join(trainable)}")
        for name in self.objective.models:
            if name not in self.models:
                raise UserError(
                    f"train.models.{name}: is missing, train.objective asks for it; valid: a checkpoint, or arm:NAME"
                )
        for name in self.models:
            if name not in self.objective.models:
                raise unknown(f"train.models.{name}", name, self.objective.models)
        object.__setattr__(self, "models", Frozen(self.models))
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"train.clip: must be positive or None, found {self.clip}")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            raise UserError(f"train.profile: found {self.profile}; valid: (first step, last step), or ()")

    @property
    def stochastic(self) -> bool:
        """Whether steps draw numbers."""
        return bool(self.surgery.stochastic or self.augmentation.stochastic)

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UserError` for a model that cannot be trained so."""
        self.surgery.check(cfg)
        self.schedule.factor(self.steps)
        self.augmentation.check(cfg, self.data.seq_len)
        self.samples.check(cfg)
        for tracker in self.trackers:
            tracker.check()
        self.mesh.check_rules(params.axes(cfg).used())

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """All who are told."""
        board = TensorBoard()
        return (board, self.tracker) if self.tensorboard and self.tracker != board else (self.tracker,)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.data.seq_len

    def determines(self) -> dict[str, Any]:
        """All settings that the resulting parameters depend on, JSON-ready: not how often a run looks and saves."""
        out: dict[str, Any] = to_dict(self)
        for name in _BESIDE:
            out.pop(name, None)
        for name, default in _ABSENT.items():  # runs from before there was such a setting keep their identity
            if out[name] == default:
                del out[name]
        return out


_BESIDE = (
    "eval_every",
    "eval_rows",
    "final_rows",
    "save_every",
    "keep_last",
    "keep_every",
    "log_every",
    "tensorboard",
    "tracker",
    "samples",
    "profile",
    "mesh",
)
_ABSENT: dict[str, Any] = {"surgery": {"name": "none"}, "augmentation": {"name": "own"}}
assert set(_BESIDE) <= {f.name for f in dataclasses.fields(TrainConfig)}
