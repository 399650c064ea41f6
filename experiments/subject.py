"""The base model of a run: one checkpoint, loaded once and shared by all arms, or random parameters by seed."""

from __future__ import annotations

from typing import Any

import jax

from experiments.arms import RANDOM, Arm, shapes
from experiments.settings import Experiment
from lm import params
from lm.config import ModelConfig
from lm.errors import UserError


def checkpoint_config(exp: Experiment) -> ModelConfig | None:
    """The checkpoint's own configuration without its weights; None for random parameters.

    Raises `UserError` when there is no such checkpoint, or when it is not one.
    """
    if exp.checkpoint == RANDOM:
        return None
    from lm import interop

    return interop.config(exp.checkpoint)


class Base:
    """Parameters and tokenizer for every arm."""

    def __init__(self, exp: Experiment, base: ModelConfig) -> None:
        self.config = base
        self.random = exp.checkpoint == RANDOM
        self._drawn: dict[Any, Any] = {}
        if self.random:
            from lm.data.tokenizers import ByteTokenizer

            self.tokenizer: Any = ByteTokenizer()
            self.identity = RANDOM
            if base.vocab_size < self.tokenizer.vocab_size:
                raise UserError(
                    f"model.vocab_size: {base.vocab_size} is less than the {self.tokenizer.vocab_size} "
                    "tokens of the byte tokenizer that checkpoint = 'random' reads with"
                )
        else:
            from lm import interop

            loaded = interop.load(exp.checkpoint)
            self.tokenizer, self.identity = loaded.tokenizer, loaded.identity
            self._params = loaded.params

    def params(self, arm: Arm, seed: int) -> Any:
        """The parameters of `arm`: the checkpoint's, or random ones, the same for all arms that share their shapes."""
        if not self.random:
            return self._params
        at = (seed, shapes(arm.model))
        if at not in self._drawn:
            self._drawn.clear()  # one set at a time is in use
            same = at[1] == shapes(self.config)
            self._drawn[at] = params.init(self.config if same else arm.model, jax.random.key(seed))
        return self._drawn[at]
