"""How a training run ends early; in each case the folder holds what is needed to go on."""

from __future__ import annotations


class TrainingStopped(Exception):
    """The run cannot go on: too many non-finite steps in a row, or a checkpoint that cannot be written."""


class Terminated(Exception):
    """SIGTERM was received, everything is saved, and the same command goes on from there."""
