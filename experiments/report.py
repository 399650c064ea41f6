"""The report of a run: Markdown, one HTML file that needs nothing else, and a PNG per curve.

``python -m experiments.report RUN_FOLDER`` writes them into the folder of its ``results.json``, or into ``--out``.
With several folders it prints a comparison of their arms and verdicts, and with ``--out`` writes it there. Of a sweep's
folder it writes tables and plots over the swept keys, with confidence intervals (`experiments.sweeps.report`).
"""

from __future__ import annotations

from experiments import cli
from experiments.reports.command import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
