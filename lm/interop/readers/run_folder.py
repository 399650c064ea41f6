"""Training runs of this library as checkpoints: ``run.json``, the newest Orbax checkpoint, the tokenizer beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import lm.interop.readers.tensors as tensors
import lm.model.params as params_lib
from lm.config import ModelConfig, plug
from lm.data.record import TextRecord, from_description
from lm.errors import UserError
from lm.interop.adapters.change import Change, changed
from lm.interop.readers.base import Reader
from lm.nested import difference
from lm.sharding.layout import Where
from lm.train import folder
from lm.train.checkpoint import read_part

FILE = folder.ABOUT
BELONGS = ("model", "train", "data", "seed", "start", "models")  # what a checkpoint and its run both say


class Run(Reader):
    """The folder of a training run."""

    def __init__(self, path: Path, reader: Callable[[str], Reader]) -> None:
        """`reader` finds who reads the checkpoint that training started from (`lm.interop.reader`)."""
        self.path, self.reader = path, reader
        self.about = folder.read_about(path)
        self._model = dict(self.about["model"])

    def model(self) -> dict[str, Any]:
        return self._model

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first; `UserError` when there is none."""
        steps = folder.steps(self.path)
        if not steps:
            raise UserError(f"{self.path}: no complete checkpoint yet; valid: a run that has saved one")
        return steps

    def step(self) -> int:
        """The newest complete checkpoint's step."""
        return self.steps()[-1]

    def surgery(self) -> Any:
        """The plug that says what was trained (`lm.surgery`)."""
        settings = self.about.get("train", {}).get("surgery", "none")
        return plug("lm.surgery", settings, f"{self.path / FILE} train.surgery")

    def start(self) -> Reader | None:
        """Reader of the checkpoint that training started from; None for random parameters.

        Raises `UserError` when the checkpoint is not where it was, or not what it was.
        """
        source = self.about.get("start_source", "")
        if not source:
            return None
        try:
            start = self.reader(source)
            same = self.about.get("start_content") in ("", start.identity())
        except UserError as e:
            raise UserError(f"{self.path}: holds adapters to {source!r}, which cannot be read: {e}") from None
        if not same:
            raise UserError(f"{self.path}: holds adapters to {source!r}, which is not the checkpoint it was then")
        return start

    def params(
        self, cfg: ModelConfig, change: Change | None = None, where: Where | None = None, step: int | None = None
    ) -> dict[str, Any]:
        """The parameters at `step`, None = the newest checkpoint; the optimizer's state is not read.

        Adapters are merged into the parameters that they belong to.
        """
        surgery = self.surgery()
        stacked = dataclasses.replace(cfg, scan_layers=self._scanned(), param_dtype=self._param_dtype())
        if surgery.adds:
            start, key = self.start(), jax.random.key(int(self.about["seed"]))
            base = params_lib.init(stacked, key) if start is None else start.params(stacked)
            found = dict(surgery.merge(stacked, base, self.trained(stacked, step)))
        else:
            found = self.trained(stacked, step)
        if change is not None:
            found = changed(stacked, found, change)
        if not cfg.scan_layers:
            found = params_lib.unstack(found)
        kind = jax.numpy.dtype(cfg.param_dtype)
        if where is None:
            return jax.tree.map(lambda x: x.astype(kind), found)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.device_put(x.astype(kind), where("/".join(str(k.key) for k in path))), found
        )

    def _scanned(self) -> bool:
        """Whether the layers were trained in one stack."""
        return bool(self._model.get("scan_layers", True))

    def _param_dtype(self) -> str:
        """What the parameters were trained in, and adapters are merged in."""
        return str(self._model.get("param_dtype", "float32"))

    def trained(self, cfg: ModelConfig, step: int | None = None) -> dict[str, Any]:
        """What training changed: all parameters, or the adapters alone."""
        surgery = self.surgery()
        step = self.step() if step is None else step
        shapes = jax.eval_shape(lambda p: surgery.init(cfg, p, jax.random.key(0)), params_lib.abstract(cfg))
        trained = read_part(self.path, step, {"params": shapes}, self._check)["params"]
        if not surgery.adds:
            tensors.check(cfg, trained, str(self.path))
        return dict(jax.tree.map(jax.numpy.asarray, trained))

    def _check(self, about: dict[str, Any]) -> None:
        """Raises `UserError` for a checkpoint that belongs to something else than ``run.json`` says."""
        for key in BELONGS:
            if about.get(key) != self.about.get(key):
                place, saved, said = difference(about.get(key), self.about.get(key), key)
                raise UserError(
                    f"{self.path}: a checkpoint of another run, by {place}: {saved!r} there, {said!r} in {FILE}; "
                    "valid: a folder as training left it"
                )

    def text(self) -> TextRecord:
        """The run's own; the templates are those of the checkpoint that training started from where it has none."""
        folder.check_files(self.path, self.about)
        own = from_description(self.path, self.about.get("tokenizer") or {})
        if own.templates or not self.about.get("start_source"):
            return own
        try:
            start = self.start()
        except UserError:  # the start is gone: the weights do not need it, unless they are adapters
            return own
        return own if start is None else dataclasses.replace(own, templates=start.text().templates)

    def identity(self) -> str:
        saved = self.path / folder.CHECKPOINTS / str(self.step())
        return tensors.content_hash([self.path / FILE, *sorted(p for p in saved.rglob("*") if p.is_file())])

    def place(self) -> str:
        return str(self.path.absolute())

    def licence(self) -> str | None:
        """That of the checkpoint that training started from."""
        try:
            start = self.start()
        except UserError:
            return None
        return None if start is None else start.licence()
