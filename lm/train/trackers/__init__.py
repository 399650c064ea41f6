"""SOCKET tracker: who else is told of a training's numbers and texts (`lm.train.trackers.base.Tracker`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "none": "lm.train.trackers.base:NoTracker",
        "tensorboard": "lm.train.trackers.tensorboard:TensorBoard",
        "wandb": "lm.train.trackers.hosted:WandB",
        "trackio": "lm.train.trackers.hosted:Trackio",
    }
)
