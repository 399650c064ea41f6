"""SOCKET head: hidden state to a distribution.

A plug is a frozen dataclass with ``module(model_config, name) -> nn.Module`` whose call is
``(h[..., D], embedding_table[V, D]) -> logits float32[..., V]``. Optional:

* ``aux(model_config, params, hidden[..., D]) -> {name: float32[...]}``: further losses of every token by name, weighted
  already. The objective adds their sum over the weighted tokens to the loss and reports each as ``aux_<name>``.
* ``loss(model_config, params, hidden, targets, weights, z_loss, chunk) -> (loss, sums)``: a cross-entropy that does not
  hold all logits, auxiliary losses included (`lm.objectives.likelihood.head_loss`).

Heads over ordered bins (`lm.heads.bins`) take every id of the vocabulary for a bin of a bounded quantity.
"""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "linear": "lm.heads.linear:Linear",
        "fourier": "lm.heads.fourier:Fourier",
        "mixture": "lm.heads.mixture:Mixture",
    }
)
