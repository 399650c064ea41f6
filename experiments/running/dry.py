"""A dry run: everything that a run would refuse before it reads a parameter, and nothing that it would write."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

import jax

from experiments.running.cache import ENVIRONMENT, shared_folder
from experiments.running.job import identities
from experiments.running.plan import Plan, Workdir, check_target
from experiments.running.runner import Runner
from experiments.spec import registry


def check(plan: Plan, source: registry.Source, workdir: Workdir, hosts: int = 1) -> None:
    """Reads the texts and tokenizers of the chosen arms, tokenizes, lays the mesh over the devices that are here, and
    asks measures and claims; of what needs a checkpoint or `hosts` that are not at hand, the texts alone.

    Tokens that earlier runs kept are read, others go into a folder that is thrown away. Raises `UserError`.
    """
    check_target(shared_folder(), ENVIRONMENT)
    if plan.base is None or hosts > 1:
        identities(plan)
        for train in (plan.arms[name].train for name in plan.chosen if hosts > 1):
            if train is not None:
                train.mesh.sizes(jax.device_count() * hosts)
        return
    Runner(plan, source, workdir, cache=Path(_scratch(shared_folder() / "data").name)).results()


@functools.cache
def _scratch(kept: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder with links to what is kept, so that it is found. One in a process: points of a sweep share what they
    tokenize. It goes when the process ends."""
    made = tempfile.TemporaryDirectory()
    with contextlib.suppress(OSError):
        for kind in (p for p in kept.iterdir() if p.is_dir()):
            into = Path(made.name) / kind.name
            into.mkdir()
            for one in kind.iterdir():
                (into / one.name).symlink_to(one.absolute())
    return made
