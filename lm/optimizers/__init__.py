"""SOCKET optimizer: from gradients to parameter updates, as optax transformations (`lm.optimizers.base.Optimizer`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "adamw": "lm.optimizers.plain:AdamW",
        "adafactor": "lm.optimizers.plain:Adafactor",
        "lion": "lm.optimizers.plain:Lion",
        "muon": "lm.optimizers.plain:Muon",
        "sgd": "lm.optimizers.plain:SGD",
        "sgd_sai": "lm.optimizers.sgd_sai:SGDSaI",
    }
)
