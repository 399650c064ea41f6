"""Parameters that an experiment trains: one training per (model, settings, data, seed), shared by all arms and runs.

Trainings live in ``$DECODER_LAB_CACHE/trained/HASH`` (default ``runs/cache``), addressed by everything that determines
them. One that was interrupted goes on from its newest checkpoint, a finished one is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.running.cache import key, shared_folder
from experiments.running.subject import Base
from experiments.spec.arms import Arm, frozen
from lm import compat, interop
from lm.config import to_dict
from lm.data.tokenizers import check_vocab
from lm.errors import UserError
from lm.interop import reader
from lm.interop.readers.tensors import check
from lm.model.language_model import DecoderModel
from lm.model.params import abstract
from lm.sharding import processes
from lm.train import loop
from lm.train.config import DataConfig
from lm.train.data import Data, prepare
from lm.train.placement import Placement
from lm.train.run import FrozenModel

Report = Callable[[float, str], None]
Tell = Callable[[str], None]


class Trainer:
    """Trainings of one experiment over `base`, the checkpoint that they start from; `arms`: those that another one's
    training may name."""

    def __init__(self, base: Base, arms: Mapping[str, Arm], cache: Path | None = None) -> None:
        """`cache`: where texts are kept as tokens (default: with what all runs share)."""
        self.base, self.arms, self.cache = base, arms, cache or shared_folder() / "data"
        self._data: dict[DataConfig, Data] = {}
        self._checked: set[Any] = set()
        self._identities: dict[str, str] = {}  # of checkpoints that are frozen models
        self._last: tuple[str, Any] | None = None  # where its devices have it
        self._whole: tuple[str, Any] | None = None  # the same as this process's own

    def data(self, arm: Arm) -> Data:
        """The arm's data; raises `UserError` for texts, tokenizers, vocabularies and batches that do not fit."""
        assert arm.train is not None and arm.trained is not None
        settings = arm.train.data
        if (arm.train, arm.trained) in self._checked:
            return self._data[settings]
        Placement(arm.trained, arm.train)
        if self.base.config is not None and arm.start is None:
            check(arm.trained, abstract(self.base.config), self.base.source)
        if settings not in self._data:
            own = None if self.base.random else self.base.text
            with processes.first():
                self._data[settings] = prepare(arm.train, self.cache, own)
        data = self._data[settings]
        check_vocab(data.tokenizer, arm.trained)
        data.check(arm.trained.vocab_size)
        data.loader(arm.train, 0)
        arm.train.check(arm.trained)
        arm.train.samples.ids(arm.trained, data.text)
        if arm.trained.positions.limit and arm.trained.positions.limit < settings.seq_len:
            raise UserError(
                f"arms.{arm.name}: train.data.seq_len: {settings.seq_len} tokens, but model.positions has "
                f"{arm.trained.positions.limit} rows; valid: a shorter seq_len or more positions"
            )
        self._checked.add((arm.train, arm.trained))
        return data

    def _models(self, arm: Arm, seed: int, report: Report, tell: Tell) -> dict[str, FrozenModel]:
        """The same with their parameters, trained first where they have to be."""
        out = {}
        for name, place in frozen(self.arms, arm.name).items():
            if isinstance(place, str):
                found = interop.load(place)
                out[name] = FrozenModel(DecoderModel(found.config), found.params, found.identity)
            elif place.train is None:
                self.base.load()
                params = self.base.params(place, place.config, seed)
                out[name] = FrozenModel(DecoderModel(place.config), params, self._identity(place, seed))
            else:
                assert place.trained is not None
                params, _ = self._trained(place, seed, report, tell)
                out[name] = FrozenModel(DecoderModel(place.trained), params, self._identity(place, seed))
        return out

    def _identity(self, place: Arm | str, seed: int) -> str:
        """What stands for the parameters of a frozen model."""
        if isinstance(place, str):
            if place not in self._identities:
                self._identities[place] = interop.load(place, load_params=False).identity
            return self._identities[place]
        if place.train is None:
            return f"{self.base.identity} {seed}" if self.base.random else self.base.identity
        return key(self.what(place, seed))

    def what(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Everything that determines the trained parameters, JSON-ready."""
        assert arm.train is not None
        models = {name: self._identity(place, seed) for name, place in frozen(self.arms, arm.name).items()}
        return {
            **({"models": models} if models else {}),
            "start": self.base.identity if arm.start is None else key(self.what(arm.start, seed)),
            "model": to_dict(arm.trained),
            "train": arm.train.determines(),
            "data": self.data(arm).identity,
            "seed": seed,
        }

    def folder(self, arm: Arm, seed: int) -> Path:
        return shared_folder() / "trained" / key(self.what(arm, seed))

    def cost(self, arm: Arm, seed: int) -> float:
        """Tokens to train on that have not been yet, three passes each; 0 for a finished training."""
        assert arm.train is not None
        left = arm.train.steps - loop.steps_done(self.folder(arm, seed))
        before = 0.0 if arm.start is None or left < arm.train.steps else self.cost(arm.start, seed)
        return before + 3.0 * left * arm.train.tokens_per_step

    def params(self, arm: Arm, seed: int, report: Report, tell: Tell) -> tuple[Any, Path]:
        """The trained parameters and the folder of their training, which runs now unless it has. Of several processes,
        all train and the first one gets the parameters (the others None)."""
        trained, folder = self._trained(arm, seed, report, tell)
        if self._whole is None or self._whole[0] != folder.name:
            self._whole = (folder.name, processes.local(trained))
        return self._whole[1], folder

    def _trained(self, arm: Arm, seed: int, report: Report, tell: Tell) -> tuple[Any, Path]:
        assert arm.train is not None and arm.trained is not None
        folder = self.folder(arm, seed)
        if self._last is None or self._last[0] != folder.name:
            self._last = self._whole = None  # one set of parameters at a time
            processes.meet()  # one process has been measuring
            compat.keep_compiled(shared_folder() / "compiled")
            start, identity, place = None, self.base.identity, self.base.place
            if arm.start is not None:
                start, begun = self._trained(arm.start, seed, report, tell)
                identity, place = key(self.what(arm.start, seed)), str(begun.absolute())
            elif not self.base.random:
                self.base.load()
                start = self.base.params(dataclasses.replace(arm, model=arm.trained), arm.trained, seed)
            models = self._models(arm, seed, report, tell)
            content = reader(place).identity if place and arm.train.surgery.adds else str
            done = loop.run(
                arm.trained,
                arm.train,
                self.data(arm),
                folder,
                seed=seed,
                start=loop.Start(start, identity, place, content),
                models=models,
                report=report,
                tell=tell,
            )
            self._last = (folder.name, done.params)
        return self._last[1], folder
