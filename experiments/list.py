"""All experiments: paper, claim, scales and the last verdict; or all plugs of every socket.

``python -m experiments.list [--json] [--plugs [KEY]]``. The verdict is that of the committed results, else of
the newest run.
"""

from __future__ import annotations

from experiments import cli
from experiments.commands.listing import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
