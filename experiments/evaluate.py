"""Tasks of the lm-evaluation-harness on a checkpoint, with any attention pattern.

``python -m experiments.evaluate --checkpoint=smollm2-135m --tasks=hellaswag,piqa [--limit=100] [--pattern=NAME]``

Needs the extra ``eval``. Most tasks of the harness download their data; ``--include=FOLDER`` adds a folder of task
files of your own, which may read local data. Results are printed as the harness prints them, and written with
``--out=FILE``.
"""

from __future__ import annotations

from experiments import cli
from experiments.commands.evaluate import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
