"""Runs one experiment: every arm, measure and seed, then a table, the verdicts and a report.

``python -m experiments.run --config=configs/X.py[:scale] [--workdir=DIR] [--arms=a,b] [--config.KEY=VALUE ...]``

``--config=RUN_FOLDER/config.json`` repeats a run. Any key of the config can be set: ``--config.seeds=(0,1)``,
``--config.model.pattern=lm_infinite``, ``--config.measures.nll.tokens=4096`` or
``--config.arms.window.model.pattern.window=512``. Finished points are kept: an interrupted run goes on where it was.

On several hosts the same command runs on each of them, in a folder that all see, and they train together; a Slurm step
and a TPU pod are found by themselves, elsewhere ``--coordinator=HOST:PORT --processes=N --process=I`` says who is who.
Process 0 measures, prints and writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import cli
from experiments.running.command import run
from lm.sharding import processes


def main(argv: Sequence[str] | None = None) -> int:
    return processes.leave(cli.command(run, __doc__)(argv))


if __name__ == "__main__":
    cli.enter(main)
