"""What a training run is: the settings that determine its parameters, and where it lives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.config import ModelConfig, to_dict
from lm.errors import UserError
from lm.model.language_model import LanguageModel
from lm.nested import difference
from lm.train.config import TrainConfig
from lm.train.data import Data


@dataclass(frozen=True, eq=False)
class Start:
    """The parameters that training starts from; the default is random ones of the run's seed.

    `identity` stands for `params` in what determines the run. `source` is the checkpoint they were read from (a path or
    a name) and `content` gives that checkpoint's content hash, asked for when a session writes about itself: a run that
    saves only adapters keeps both, because whoever reads the adapters needs the parameters they belong to.
    """

    params: Mapping[str, object] | None = None
    identity: str = "random"
    source: str = ""
    content: Callable[[], str] = str


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model that the objective runs and that nobody trains; `identity` stands for its parameters in what determines
    the run."""

    model: LanguageModel
    params: Any
    identity: str


@dataclass(frozen=True, eq=False)
class Run:
    """One training of `cfg` on `data` as `train` says, in `folder`."""

    cfg: ModelConfig
    train: TrainConfig
    data: Data
    folder: Path
    seed: int = 0
    start: Start = Start()
    models: Mapping[str, FrozenModel] = field(default_factory=dict)  # beside the trained one, by name

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """All that determines the trained parameters, as JSON gives it back."""
        about = {
            "model": to_dict(self.cfg),
            "train": self.train.determines(),
            "data": self.data.identity,
            "seed": self.seed,
            "start": self.start.identity,
            **({"models": {name: m.identity for name, m in self.models.items()}} if self.models else {}),
        }
        return dict(json.loads(json.dumps(about)))

    def check_same(self, about: Mapping[str, object]) -> None:
        """Raises `UserError` for a checkpoint of another run (`about` is what it belongs to), naming what differs."""
        for key, ours in self.about.items():
            if about.get(key) != ours:
                place, old, new = difference(about.get(key), ours, key)
                raise UserError(
                    f"{self.folder}: holds a training run with another {place}: {old!r} there, {new!r} here; "
                    "valid: the same settings, or another folder"
                )
