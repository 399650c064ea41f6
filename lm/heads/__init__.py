"""SOCKET head: hidden state to a distribution.

A plug is a frozen dataclass with ``module(model_config, name) -> nn.Module`` whose call is
``(h[..., D], embedding_table[V, D]) -> logits float32[..., V]``. Optional: ``loss(model_config, params, hidden,
targets, weights, z_loss, chunk) -> (loss, sums)``, a cross-entropy that does not hold all logits
(`lm.objectives.causal.head_loss`).
"""

from __future__ import annotations

from lm.heads.linear import Linear

TABLE = {"linear": Linear}
