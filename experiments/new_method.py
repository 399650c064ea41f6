"""A new method's files: the plug, its row, its config and its tests, each with what is left to write.

``python -m experiments.new_method NAME --socket=pattern [--arxiv=ID]``. Until they are filled the tests fail and say
what is missing where. Nothing is overwritten.
"""

from __future__ import annotations

from experiments import cli
from experiments.commands.new_method import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
