"""A Slurm cluster of one node for tests: its daemons, started from its own configuration in a folder of its own.

Needs the binaries (Debian: ``apt-get install slurm-wlm munge``) and root, who alone may run a node daemon for jobs of
any user. Nothing of the machine's own Slurm, if it has one, is read or written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

BINARIES = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol", "scancel")
CPUS = 8  # that the node says it has: jobs of tests need not wait for each other
STARTS = 30.0  # seconds

# No cgroups and no accounting, which need a system's own set-up. A requeued job waits `cred_expire` seconds. The
# processes of a step look for the first one by the name of its node.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
JobRequeue=0
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """Why there is none here, in one line."""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _where(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts munged, slurmctld and slurmd, yields the environment in which Slurm's commands find them, and ends them;
    raises `NoCluster` where that is not possible."""
    missing = [name for name in BINARIES if _where(name) is None]
    if missing:
        raise NoCluster(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        raise NoCluster("slurmd must be started by root")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    places = {"host": socket.gethostname().partition(".")[0], "controller": _free_port(), "node": _free_port()}
    conf.write_text(CONF.format(folder=folder, cpus=CPUS, **places))
    environment = {"SLURM_CONF": str(conf)}
    munge = {name: f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", "--num-threads=1", *munge.values()],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.log").open("wb") as log:
                words = [str(_where(command[0])), *command[1:]]
                started.append(
                    subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment}, cwd=folder)
                )
            if command[0] == "munged":
                _wait(folder, started, lambda: (folder / "munge.socket").exists())
        _wait(folder, started, lambda: _idle(environment))
        yield environment
    finally:
        _end(environment, started)


def _idle(environment: dict[str, str]) -> bool:
    command = ["sinfo", "--noheader", "--format=%T"]
    asked = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return asked.returncode == 0 and asked.stdout.strip() == "idle"


def _wait(folder: Path, started: list[subprocess.Popen[bytes]], ready: object) -> None:
    deadline = time.monotonic() + STARTS
    assert callable(ready)
    while not ready():
        dead = [p for p in started if p.poll() is not None]
        if dead or time.monotonic() > deadline:
            name = Path(str((dead or started)[-1].args[0])).name  # type: ignore[index]
            lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise NoCluster(f"{name} does not start: {lines[-1]}")
        time.sleep(0.05)


def _end(environment: dict[str, str], started: list[subprocess.Popen[bytes]]) -> None:
    """Jobs first: they are no children of the daemons' parent."""
    if len(started) == 3 and all(p.poll() is None for p in started):
        env = {**os.environ, **environment}
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=env, capture_output=True, timeout=30)
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=30)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            left = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True, timeout=30).stdout
            if not left.strip():
                break
            time.sleep(0.1)
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
    for process in reversed(started):
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
