"""Runs one experiment at many settings: every point of a sweep that the config file describes, each in its own folder.

``python -m experiments.sweep --config=configs/X.py[:scale] [--sweep=NAME] [--engine=local|print|slurm] [--parallel=N]
[--workdir=DIR] [--arms=a,b] [--config.KEY=VALUE ...] [--slurm=KEY=VALUE,...] [--dry-run]``
or, for a search, ``--search=optuna[:SAMPLER] --trials=N --minimise=ARM:METRIC`` (or ``--maximise``) ``[--storage=URL]``

A sweep is a function ``sweep_NAME()`` in the config file that yields dicts of dotted keys, as for ``--config.KEY``;
`experiments.sweeps` has combinators for them. All points are checked before anything starts. ``--config.KEY=VALUE``
holds for every point, and may not set what the sweep sets.

The same command again continues: a point's folder ``DIR/HASH-KEYS`` (the hash is of the config file and all settings of
the point) says by its files how far it is. ``DONE``: finished, and skipped from then on. ``RUNNING``: process, host and
heartbeat of who works on it; left alone while that process lives, taken over when it is dead or, on another host,
silent for two minutes. ``FAILED``: the exit code and the last lines; tried again. None of these: new, or interrupted
and resumed by `experiments.run` where it was. ``log.txt`` has all that the point's runs have printed.

Engines: ``local`` runs N processes at a time (default 1; with more than one, measured times disturb each other) and
ends them when it is interrupted; ``print`` writes nothing and prints one shell line per point that is left, for any
other scheduler; ``slurm`` submits a job array through submitit (``pip install 'decoder-lab[slurm]'``), waits for it
and cancels it when interrupted. ``--slurm=partition=x,timeout_min=60`` sets submitit's parameters (without
``timeout_min`` a job has submitit's five minutes), ``tasks_per_node=2`` or ``nodes=2`` makes one training of several
processes of each point, ``cluster=local`` tries it without a cluster. A job that is preempted, requeued or at its time
limit saves, and goes on by itself (`experiments.sweeps.slurm`).

A search (``pip install 'decoder-lab[optuna]'``) asks Optuna for points of ``search_NAME(trial)`` in the config file,
and tells it the mean of a metric of an arm; samplers: tpe (the default), random, qmc. See `experiments.sweeps.search`.

Ends with a table, and ``sweep.json`` and ``sweep.csv`` in DIR (default ``runs/sweeps/X-SCALE-NAME``) with every point's
changes and means; ``python -m experiments.report DIR`` makes tables and plots of them, with confidence intervals. The
exit code is 0 when every point is done, 1 when some are not, 2 for a mistake in the input and 130 for an interrupt.
"""

from __future__ import annotations

import sys

from experiments import cli
from experiments.sweeps.command import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # checking needs no accelerator, and must hold none while points run
    sys.exit(main())
