"""The base model of a run: one checkpoint, loaded once and shared by all arms, or random parameters by seed."""

from __future__ import annotations

from typing import Any

import jax

from experiments.spec.arms import RANDOM, Arm, shapes
from lm import interop
from lm.config import ModelConfig
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer, Tokenizer, check_vocab
from lm.model import params


class Base:
    """Configuration, tokenizer and identity at once, weights by `load`.

    `place`: where the checkpoint is found from any working directory (a name, an absolute path, a repository with its
    commit), empty for random parameters.

    `config` is the checkpoint's own (None for random parameters, whose model the experiment describes). Raises
    `UserError` when there is no such checkpoint, or when it is not one.
    """

    def __init__(self, checkpoint: str) -> None:
        self.source = checkpoint
        self.random = checkpoint == RANDOM
        self.config: ModelConfig | None = None
        self.text = TextRecord.of(ByteTokenizer())
        self.identity, self.place = RANDOM, ""
        self._params: Any = None
        self._drawn: dict[Any, Any] = {}
        if not self.random:
            header = interop.load(checkpoint, load_params=False)
            self.config, self.text, self.identity = header.config, header.text, header.identity
            self.place = header.source

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.text.tokenizer

    def check(self, model: ModelConfig) -> None:
        """Raises `UserError` when the tokenizer has ids that `model` has no embedding for."""
        if self.tokenizer is not None:
            check_vocab(self.tokenizer, model)

    def load(self) -> None:
        """Reads the weights; raises `UserError` for missing or misshapen tensors and damaged files."""
        if not self.random and self._params is None:
            self._params = interop.load(self.place).params

    def params(self, arm: Arm, base: ModelConfig, seed: int) -> Any:
        """The parameters of `arm`: the checkpoint's, or random ones, the same for all arms that share their shapes."""
        if not self.random:
            return self._params
        model = base if shapes(arm.config) == shapes(base) else arm.config
        at = (seed, model)
        if at not in self._drawn:
            if any(other != seed for other, _ in self._drawn):
                self._drawn.clear()  # one seed at a time is in use
            self._drawn[at] = params.init(model, jax.random.key(seed))
        return self._drawn[at]
