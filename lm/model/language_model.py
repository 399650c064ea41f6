"""What generation, training and measuring ask of a model, and the decoder as one such model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lm import caches
from lm.attention.branches import Keys
from lm.caches import Caches
from lm.config import ModelConfig
from lm.heads.base import Sums, Targets
from lm.model import params as params_lib
from lm.model.decoder import Decoder, readout
from lm.model.inputs import Inputs
from lm.model.output import Output
from lm.watch import Watch

Params = Any  # a tree of arrays and weights


class LanguageModel:
    """A model of texts; hashable, because compiled programs depend on it. Parameters and caches are arguments."""

    vocab_size: int

    def apply(
        self,
        params: Params,
        inputs: Inputs,
        cache: Any = None,
        watch: Watch = Watch(),  # noqa: B008  (frozen)
        commit: bool = True,
    ) -> Output:
        """One call; see `lm.model.decoder.Decoder`."""
        raise NotImplementedError

    def cache(self, batch: int, capacity: int) -> Any:
        """The empty cache of `batch` rows of at most `capacity` tokens. Raises `UserError` for a model whose texts
        cannot be continued token by token."""
        raise NotImplementedError

    def commit(self, cache: Any, fresh: Any, path_BP: jax.Array, count_B: jax.Array) -> Any:
        """The cache with a path kept of tokens that a call without ``commit`` has read (`lm.caches.commit`)."""
        raise NotImplementedError

    def seal(self, cache: Any) -> Any:
        """The cache after a prompt has been read."""
        return cache

    def readout(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits float32 ``[..., V]`` of hidden states ``[..., D]`` as `apply` gives them."""
        raise NotImplementedError

    def readout_params(self, params: Params) -> Params:
        """The part of the parameters that `readout` and `aux` read."""
        return params

    def loss(self, params: Params, over: Targets) -> tuple[jax.Array, Sums] | None:
        """A cross-entropy without an array of all logits, where the model has its own (`lm.heads.base.Head.loss`)."""
        return None

    def aux(self, params: Params, hidden: jax.Array) -> dict[str, jax.Array]:
        """Further losses of every token by name, float32 ``[...]``, weighted already."""
        return {}

    def unstacked(self, params: Params) -> Params:
        """The same parameters as a program that makes one token at a time reads them best."""
        return params

    def layers(self) -> tuple[ModelConfig, ...]:
        """The configuration of every layer; empty for a model that has none."""
        return ()

    @property
    def trained_length(self) -> int:
        """Tokens of the texts that the parameters were trained on."""
        raise NotImplementedError

    @property
    def limit(self) -> int:
        """Positions there are; 0 = any number."""
        return 0

    @property
    def room(self) -> int | None:
        """Tokens that a row of the cache may have at most; None = as many as are asked for."""
        return None


@dataclass(frozen=True)
class DecoderModel(LanguageModel):
    """The decoder of a configuration."""

    cfg: ModelConfig

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.cfg.vocab_size

    @property
    def trained_length(self) -> int:
        return self.cfg.max_positions

    @property
    def limit(self) -> int:
        return self.cfg.positions.limit

    @property
    def room(self) -> int | None:
        return self.cfg.cache.room

    def apply(
        self,
        params: Params,
        inputs: Inputs,
        cache: Caches | None = None,
        watch: Watch = Watch(),  # noqa: B008  (frozen)
        commit: bool = True,
    ) -> Output:
        out: Output = Decoder(self.cfg).apply({"params": params}, inputs, cache, watch, commit)
        return out

    def cache(self, batch: int, capacity: int) -> Caches:
        return caches.init(self.cfg, batch, capacity)

    def commit(self, cache: Caches, fresh: tuple[Keys | None, ...], path_BP: jax.Array, count_B: jax.Array) -> Caches:
        return caches.commit(cache, fresh, path_BP, count_B)

    def seal(self, cache: Caches) -> Caches:
        return caches.seal(cache)

    def readout(self, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
        return readout(self.cfg, params, hidden)

    def readout_params(self, params: Mapping[str, Any]) -> Params:
        return {name: params[name] for name in ("embed", "head") if name in params}

    def loss(self, params: Mapping[str, Any], over: Targets) -> tuple[jax.Array, Sums] | None:
        return self.cfg.head.loss(self.cfg, params, over)

    def aux(self, params: Mapping[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
        return self.cfg.head.aux(self.cfg, params, hidden)

    def unstacked(self, params: dict[str, Any]) -> dict[str, Any]:
        return params_lib.unstack(params)

    def layers(self) -> tuple[ModelConfig, ...]:
        return self.cfg.layers()
