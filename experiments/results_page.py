"""``RESULTS.md`` from the committed ``results/*/results.json``.

``python -m experiments.results_page`` writes it; with ``--check`` it only says whether the file is up to date.
"""

from __future__ import annotations

from experiments import cli
from experiments.reports.page import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
