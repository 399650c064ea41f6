"""SOCKET tracker: who else is told of a training's numbers and texts (`lm.trackers.base.Tracker`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "none": "lm.trackers.base:NoTracker",
        "tensorboard": "lm.trackers.tensorboard:TensorBoard",
        "wandb": "lm.trackers.hosted:WandB",
        "trackio": "lm.trackers.hosted:Trackio",
    }
)
