"""The only way an objective runs a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from lm.heads.base import Sums, Targets
from lm.model.inputs import Inputs
from lm.model.language_model import LanguageModel
from lm.model.output import Output
from lm.model.reports import Reports
from lm.objectives.likelihood import head_loss
from lm.watch import Watch

HIDDEN = Watch(logits=False)


@dataclass(frozen=True)
class Frozen:
    """A model whose parameters are not trained: a teacher, a reference."""

    model: LanguageModel
    params: Any

    def __call__(self, inputs: Inputs, watch: Watch = HIDDEN) -> Output:
        out = self.model.apply(jax.lax.stop_gradient(self.params), inputs, watch=watch)
        return jax.tree.map(jax.lax.stop_gradient, out)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 ``[..., V]`` of hidden states."""
        return jax.lax.stop_gradient(self.model.readout(self.params, hidden))


@dataclass
class Forward:
    """The trained model of one training step, and the frozen ones beside it.

    Calls give hidden states, and logits where the watch asks for them. What layers report is noted here
    (`lm.model.reports`), so that an objective cannot leave it out. `key`: for layers that know training from use;
    `positions_BT`: float32, those of an augmentation, None = the tokens' own. A forward lives for one trace.
    """

    model: LanguageModel
    params: Any
    key: jax.Array | None = None
    positions_BT: jax.Array | None = None
    models: Mapping[str, Frozen] = field(default_factory=dict)
    reports: list[Reports] = field(default_factory=list)

    def __call__(self, inputs: Inputs, watch: Watch = HIDDEN) -> Output:
        positions = self.positions_BT if inputs.positions_BT is None else inputs.positions_BT
        inputs = dataclasses.replace(inputs, key=self.key, positions_BT=positions)
        out = self.model.apply(self.params, inputs, watch=watch)
        self.reports.append(out.reports)
        return out

    def rows(self, batch: Mapping[str, jax.Array]) -> Inputs:
        """The inputs of a batch of token rows."""
        return Inputs(batch["inputs"], index_BT=batch.get("index"), segments_BT=batch.get("segments"))

    def likelihood(self, over: Targets) -> tuple[jax.Array, Sums]:
        """The cross-entropy of targets under the trained model's head (`head_loss`)."""
        return head_loss(self.model, self.params, over)
