"""``python -m experiments.certificates``: writes ``docs/certificates.md`` again from the committed certificates."""

from __future__ import annotations

from experiments import cli
from experiments.certificates.kept import run

if __name__ == "__main__":
    cli.enter(lambda: cli.main(run))
