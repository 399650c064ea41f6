"""What the model writes while it is being trained: ``train.samples``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from lm.config import ModelConfig
from lm.data.record import TextRecord
from lm.decoding import Generator, Sampling
from lm.errors import UserError
from lm.model.language_model import DecoderModel
from lm.plug import bounded, check_bounds, seed_field

KEY = "train.samples"


@dataclass(frozen=True)
class Samples:
    """Answers to `prompts` (none = off) after every `every` steps and at the end, of at most `max_new_tokens` tokens.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all. Draws depend on `seed` alone, and the
    training's numbers on none of this.
    """

    prompts: tuple[str, ...] = ()
    every: int = bounded(100, at_least=1)
    max_new_tokens: int = bounded(64, at_least=1)
    temperature: float = bounded(0.0, at_least=0)
    top_k: int = bounded(0, at_least=0)
    top_p: float = 1.0
    seed: int = seed_field()

    def __post_init__(self) -> None:
        check_bounds(self, KEY)
        try:
            _ = self._sampling  # refuses what is no way to draw
        except UserError as e:
            raise UserError(f"{KEY}.{e}") from None

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UserError` for a model whose texts cannot be continued, and for several processes."""
        if not self.prompts:
            return
        if jax.process_count() > 1:
            raise UserError(f"{KEY}.prompts: {jax.process_count()} processes train; valid: (), or one process")
        self._sampling.check(cfg.vocab_size)
        jax.eval_shape(lambda: DecoderModel(cfg).cache(1, 1))

    def due(self, done: int, steps: int) -> bool:
        """Whether answers are due after `done` of `steps` steps."""
        return bool(self.prompts) and (done % self.every == 0 or done == steps)

    def ids(self, cfg: ModelConfig, text: TextRecord) -> list[list[int]]:
        """The prompts as the model reads them. Raises `UserError` for one without any token, or with an unknown one."""
        ids = [text.encode(prompt, cfg.vocab_size, f"{KEY}.prompts") for prompt in self.prompts]
        for prompt, found in zip(self.prompts, ids, strict=True):
            if not found:
                raise UserError(f"{KEY}.prompts: {prompt!r} is empty; valid: at least one token")
        return ids

    def written(self, cfg: ModelConfig, params: Any, text: TextRecord) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Each prompt with its answer, and how that ended."""
        tokenizer, ids = text.needs_tokenizer(KEY), self.ids(cfg, text)
        stop = [i for i in text.stop_ids if i < cfg.vocab_size]
        made = Generator(DecoderModel(cfg), params)(
            ids,
            self._sampling,
            max_new_tokens=self.max_new_tokens,
            stop=stop,
            seeds=[self.seed] * len(ids),
        )
        for prompt, head, (answer,) in zip(self.prompts, ids, made, strict=True):
            tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
            about = {"finish": answer.finish, "tokens": len(answer.tokens), "logprob": answer.logprob}
            yield prompt, tokenizer.continued(head, tokens), about

    @property
    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
