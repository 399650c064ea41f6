"""What a training survives, counted by doing it: kills, lost processes, other layouts, damaged checkpoints.

    python -m benchmarks.faults [--kills=12] [--pair-kills=4] [--damages=300] [--inputs=3000] [--seed=0]
        [--only=restores,frozen] [--out=FILE.json]

Every run is the training command (`experiments.run`) in processes of its own, on CPU devices. Each count is N of N:
runs killed by SIGKILL at random moments and in the middle of a save, alone and as one of two processes, that ended with
the log of a run that nothing happened to, bit for bit; runs that went on from the checkpoint of another layout and
number of processes with the same losses; every file of a checkpoint, flipped, cut off and deleted in turn, where what
counts is that no state is ever used that differs from the one saved; seeded damages of all other files that are kept;
and malformed configs, command lines and files, where what counts is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import run
from experiments.running.environment import describe
from lm.config import build, model_config
from lm.errors import UserError
from lm.files import write_json
from lm.model import params
from lm.train.checkpoint import Checkpoints
from lm.train.config import TrainConfig
from lm.train.log import read
from lm.train.step import initial

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ["--config=configs/pretrain.py:smoke", "--config.train.eval_every=0", "--config.train.final_rows=8"]
HEARTBEAT = 10  # seconds
CLOSE = 1e-4  # relative: how far losses may be apart where additions come in another order
PATIENCE = 300.0  # seconds for what should take a few
SAVING = "*orbax-checkpoint-tmp*"
# Name, processes, devices of each, train.mesh.
PLACES: list[tuple[str, int, int, dict[str, int]]] = [
    ("1 process, 1 device", 1, 1, {}),
    ("2 processes, fsdp 2", 2, 1, {"fsdp": 2}),
    ("2 processes, data 2", 2, 1, {}),
    ("4 processes, data 2 x fsdp 2", 4, 1, {"fsdp": 2}),
    ("1 process, fsdp 2 x tensor 2", 1, 4, {"fsdp": 2, "tensor": 2}),
]
SOURCES = (0, 1)


class Job:
    """The processes of one run, forked from this one, which has imported everything and started nothing."""

    def __init__(self, cache: Path, settings: Sequence[str], n: int = 1, devices: int = 1, **mesh: int) -> None:
        self.cache, self.born = cache, time.time()
        self.pids: list[int] = []
        self.codes: list[int | None] = [None] * n
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "output0").write_text("")
        args = [*CONFIG, *settings, *(f"--config.train.mesh.{k}={v}" for k, v in mesh.items())]
        args += [f"--workdir={cache / 'run'}", f"--heartbeat={HEARTBEAT}"]
        flags = [f"--coordinator=127.0.0.1:{_port()}", f"--processes={n}"] if n > 1 else []
        for i in range(n):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    out = os.open(cache / f"output{i}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(out, 1)
                    os.dup2(out, 2)
                    os.environ["DECODER_LAB_CACHE"] = str(cache)
                    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
                    code = run.main([*args, *flags, *([f"--process={i}"] if n > 1 else [])])
                    sys.stdout.flush()
                    if n > 1:
                        jax.distributed.shutdown()
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def alive(self) -> bool:
        """Whether all of its processes run."""
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[i] = os.waitstatus_to_exitcode(status)
        return all(code is None for code in self.codes)

    def end(self) -> list[int]:
        """Waits for all and gives their exit codes."""
        deadline = time.monotonic() + PATIENCE
        while any(code is None for code in self.codes):
            self.alive()
            if time.monotonic() > deadline:
                for pid, code in zip(self.pids, self.codes, strict=True):
                    if code is None:
                        os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"error: a run did not end in {PATIENCE:.0f} s: {self.said(0)}")
            time.sleep(0.01)
        return [code for code in self.codes if code is not None]

    def said(self, i: int) -> str:
        return (self.cache / f"output{i}").read_text(errors="replace")[-1500:]

    def whole(self) -> None:
        """It must have ended well."""
        if set(self.end()) != {0}:
            raise SystemExit(f"error: a run ended with {self.codes}: {self.said(0)}")


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def training(cache: Path) -> Path | None:
    return next(iter((cache / "trained").glob("*")), None)


def log(cache: Path) -> list[Any]:
    """Everything that a training logged and that is not a time."""
    folder = training(cache)
    timed = ("seconds", "tokens_per_second", "mfu")
    lines = [] if folder is None else read(folder / "metrics.jsonl")
    return [{k: v for k, v in x.items() if k not in timed} for x in lines]


def strike(job: Job, victim: int, moment: str, rng: random.Random) -> bool:
    """Kills one process at a random time, or while a checkpoint is being written; False when the run was quicker."""
    folder, delay, until = job.cache / "trained", rng.uniform(0.3, 6.0), None
    while job.alive():
        if until is None and (job.cache / "output0").stat().st_size:  # the processes have met
            until = time.monotonic() + delay
        # What an earlier kill left behind is older than this job.
        fresh = (p for p in folder.glob(f"*/checkpoints/{SAVING}") if _touched(p) > job.born)
        saving = moment == "save" and any(True for _ in fresh)
        if saving or (moment == "random" and until is not None and time.monotonic() > until):
            os.kill(job.pids[victim], signal.SIGKILL)
            return True
        time.sleep(0.002)
    return False


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been renamed
        return 0.0


def kills(folder: Path, n: int, processes: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """A training killed `n` times, half of them in the middle of a save, against one that nothing happened to."""
    settings = [f"--config.train.steps={steps}", "--config.train.save_every=3"]
    Job(folder / "unbroken", settings, processes).whole()
    done = {"random": 0, "save": 0}
    codes, ends = [], []
    while sum(done.values()) < n:
        moment, victim = ("random", "save")[sum(done.values()) % 2], sum(done.values()) // 2 % processes
        job = Job(folder / "killed", settings, processes)
        struck = strike(job, victim, moment, rng)
        start = time.monotonic()
        found = job.end()
        if not struck:
            break
        ends.append(time.monotonic() - start)
        codes += [c for i, c in enumerate(found) if i != victim]
        done[moment] += 1
        print(f"  kill {sum(done.values())} of {n}, process {victim} ({moment})", file=sys.stderr, flush=True)
    Job(folder / "killed", settings, processes).whole()
    same = log(folder / "killed") == log(folder / "unbroken")
    out: dict[str, Any] = {
        "kills": sum(done.values()),
        "survived": sum(done.values()) if same else 0,
        "in_a_save": done["save"],
    }
    if processes > 1:
        out |= {"others_ended": sum(c != 0 for c in codes), "others_ended_after_s_max": round(max(ends), 2)}
    return {"processes": processes, **out, "steps": steps, "log_identical": same}


def frozen(folder: Path) -> dict[str, Any]:
    """One of two processes stops answering without dying: how long the other one waits."""
    job = Job(folder, ["--config.train.steps=3000", "--config.train.save_every=1000"], 2)
    while job.alive() and not log(folder):
        time.sleep(0.01)
    os.kill(job.pids[1], signal.SIGSTOP)
    start = time.monotonic()
    while job.alive() and time.monotonic() < start + PATIENCE:
        time.sleep(0.01)
    seconds = time.monotonic() - start
    os.kill(job.pids[1], signal.SIGKILL)
    code = job.end()[0]
    return {"heartbeat_s": HEARTBEAT, "other_ended_after_s": round(seconds, 1), "exit_code": code}


def restores(folder: Path) -> dict[str, Any]:
    """Checkpoints of one layout, gone on with on another."""
    settings = ["--config.train.steps=12", "--config.train.save_every=6"]
    pairs = []
    for s in SOURCES:
        name, n, devices, mesh = PLACES[s]
        Job(folder / f"from{s}", settings, n, devices, **mesh).whole()
        want = [x["loss"] for x in log(folder / f"from{s}") if "loss" in x]
        for t, (to, n, devices, mesh) in enumerate(PLACES):
            if t == s:
                continue
            cache = folder / f"from{s}to{t}"
            shutil.copytree(folder / f"from{s}", cache, ignore=shutil.ignore_patterns("points", "run"))
            shutil.rmtree((training(cache) or cache) / "checkpoints" / "12")
            job = Job(cache, settings, n, devices, **mesh)
            job.whole()
            got = [x["loss"] for x in log(cache) if "loss" in x]
            resumed = "going on from step 6" in (cache / "output0").read_text()
            apart = float(np.max(np.abs(np.array(got[6:]) / np.array(want[6:]) - 1))) if len(got) == 12 else np.inf
            good = resumed and got[:6] == want[:6] and apart < CLOSE
            pairs.append({"saved_on": name, "restored_on": to, "relative_difference": apart, "same": bool(good)})
            print(f"  {name} -> {to}: {apart:.1e}", file=sys.stderr, flush=True)
    return {"restores": len(pairs), "same": sum(p["same"] for p in pairs), "limit": CLOSE, "pairs": pairs}


def damages(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Every file of a checkpoint, damaged in every way. In this process: to be called last."""
    settings = ["--config.train.steps=12", "--config.train.save_every=6"]
    Job(folder / "sound", settings).whole()
    source = (training(folder / "sound") or folder) / "checkpoints"
    about = json.loads((source / "12" / "about" / "metadata").read_text())
    cfg, train = model_config(about["model"]), build(TrainConfig, about["train"], "train")
    like = jax.eval_shape(lambda: initial(cfg, train, params.init(cfg, jax.random.key(0))))
    kept = Checkpoints(source)
    found = kept.newest(like, lambda about: None, print)
    kept.close()
    assert found is not None and found[0] == 12
    files = sorted(p.relative_to(source) for p in (source / "12").rglob("*") if p.is_file())
    counts = {"older_used_and_told": 0, "refused": 0, "harmless": 0, "wrong": 0}
    cases = []

    def check(theirs: dict[str, Any]) -> None:
        if any(theirs.get(k) != about[k] for k in ("model", "train", "data", "seed", "start")):
            raise UserError("another run's")

    for file in files:
        for how in ("flipped", "cut off", "deleted"):
            if (source / file).stat().st_size == 0 and how != "deleted":
                continue
            place = folder / "damaged" / "checkpoints"
            shutil.rmtree(place.parent, ignore_errors=True)
            shutil.copytree(source, place)
            _damage(place / file, how, rng)
            told: list[str] = []
            kept = Checkpoints(place)
            try:
                got = kept.newest(like, check, told.append)
                if got is not None and got[0] == 6 and told:
                    outcome = "older_used_and_told"
                else:
                    outcome = "harmless" if got is not None and got[0] == 12 and _same(got[1], found[1]) else "wrong"
            except UserError:
                outcome = "refused"
            finally:
                kept.close()
            counts[outcome] += 1
            cases.append({"file": str(file), "how": how, "outcome": outcome})
    return {"damages": len(cases), "files": len(files), **counts, "cases": cases}


def _damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "cut off":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.unlink()


def _same(a: Any, b: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def stores(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """`n` damages of every kind of file that is kept (``tests/faults``), read as the commands read them."""
    kinds = _told(folder, "tests/faults/injector.py", n, seed)
    total = {what: sum(kind.get(what, 0) for kind in kinds.values()) for what in ("same", "refused", "mended")}
    return {"damages": n * len(kinds), **total, "bad": n * len(kinds) - sum(total.values()), "kinds": kinds}


def inputs(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """`n` malformed configs, command lines and files (``tests/front``), each given to a command."""
    return _told(folder, "tests/front/judged.py", n, seed)


def _told(folder: Path, script: str, n: int, seed: int) -> dict[str, Any]:
    """The counts of a script of the tests, in a process of its own."""
    places = [ROOT, *(ROOT / "tests" / name for name in ("", "train", "faults", "front"))]
    out, said = folder / "counts.json", folder / "said"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "DECODER_LAB_CACHE": str(folder / "cache")}
    with said.open("w") as file:
        args = [sys.executable, script, f"--n={n}", f"--seed={seed}", f"--out={out}"]
        subprocess.run(args, cwd=ROOT, env=env, stdout=file, stderr=file, check=False)
    if not out.is_file():
        raise SystemExit(f"error: {script} did not end: {said.read_text(errors='replace')[-1500:]}")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def reliability(out: dict[str, Any]) -> str:
    """The three figures, each N of N: what survived, what was restored, what was noticed. A part that has not been run
    has none. A damage counts as noticed when it changes what would be read: some bytes of a file nobody reads."""
    lines = []
    runs = [out[n] for n in ("kills", "pair_kills") if n in out]
    if runs:
        kills, survived = (sum(x[k] for x in runs) for k in ("kills", "survived"))
        lines.append(f"kills survived: {survived} of {kills} (bit for bit the log of an undisturbed run)")
    if "restores" in out:
        lines.append(
            "restores on other layouts: {same} of {restores} (losses within {limit:g})".format(**out["restores"])
        )
    if "damages" in out:
        x = out["damages"]
        noticed, all_told = x["older_used_and_told"] + x["refused"], x["damages"] - x["harmless"]
        lines.append(f"corrupt shards detected: {noticed} of {all_told} ({x['harmless']} more damages change nothing)")
    if "stores" in out:
        x = out["stores"]
        lines.append(
            f"other damaged files told, made again or without effect: {x['damages'] - x['bad']} of {x['damages']}"
        )
    if "inputs" in out:
        x = out["inputs"]
        lines.append(f"malformed inputs that end in one line, or well: {x['inputs'] - x['bad']} of {x['inputs']}")
    return "\n".join(lines)


def _write(path: Path | None, out: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, out)


# In this order: the last one starts a backend in this process, which may not fork from then on.
PARTS: dict[str, tuple[Callable[[Path, random.Random, Any], dict[str, Any]], str]] = {
    "kills": (
        lambda folder, rng, options: kills(folder, options.kills, 1, 150, rng),
        "kills, one process: {survived} of {kills} survived, {in_a_save} in a save",
    ),
    "pair_kills": (
        lambda folder, rng, options: kills(folder, options.pair_kills, 2, 30, rng),
        "kills, one of two processes: {survived} of {kills} survived, {in_a_save} in a save; the other one ended after "
        "at most {others_ended_after_s_max} s",
    ),
    "restores": (
        lambda folder, rng, options: restores(folder),
        "restores on other layouts and processes: {same} of {restores}",
    ),
    "frozen": (
        lambda folder, rng, options: frozen(folder),
        "a process that hangs: the other one ended after {other_ended_after_s} s",
    ),
    "stores": (
        lambda folder, rng, options: stores(folder, options.damages, options.seed),
        "damaged files of runs, caches, points, logs and results: {damages}; refused {refused}, made again and told "
        "{mended}, no effect {same}, anything else {bad}",
    ),
    "inputs": (
        lambda folder, rng, options: inputs(folder, options.inputs, options.seed),
        "malformed inputs: {inputs}; ended badly {bad}, accepted {passed}",
    ),
    "damages": (
        lambda folder, rng, options: damages(folder, rng),
        "damaged files of a checkpoint: {damages}; older one used and told {older_used_and_told}, refused {refused}, "
        "no effect {harmless}, wrong state used {wrong}",
    ),
}
GOOD: dict[str, Callable[[dict[str, Any]], bool]] = {
    "kills": lambda x: x["log_identical"],
    "pair_kills": lambda x: x["log_identical"],
    "restores": lambda x: x["same"] == x["restores"],
    "stores": lambda x: not x["bad"],
    "inputs": lambda x: not x["bad"] and not x["passed"],
    "damages": lambda x: not x["wrong"],
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=12, help="of a run of one process")
    parser.add_argument("--pair-kills", type=int, default=4, help="of one process of two")
    parser.add_argument("--damages", type=int, default=300, help="of every kind of file that is kept")
    parser.add_argument("--inputs", type=int, default=3000, help="malformed configs, command lines and files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="some of " + ", ".join(PARTS) + "; the rest of FILE stays")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles faster; no speed is measured here
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SystemExit(f"error: --only: found {unknown[0]!r}; valid: {', '.join(PARTS)}")
    out: dict[str, Any] = {"benchmark": "faults"}
    if options.only and options.out is not None and options.out.is_file():
        out = json.loads(options.out.read_text(encoding="utf-8"))
    environment = None
    for name in (part for part in PARTS if part in chosen):
        rng, start = random.Random(options.seed), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            part, text = PARTS[name]
            found = part(Path(folder), rng, options)
        out[name] = {**found, "seed": options.seed, "seconds": round(time.monotonic() - start, 1)}
        print(text.format(**found), flush=True)
        _write(options.out, out)  # a long run: what is measured is kept
    if "damages" in chosen:  # only now may this process start a backend: forks of one that has do not work
        environment = describe()
    _write(options.out, {**out, **({"environment": environment} if environment else {})})
    print(reliability(out), flush=True)
    bad = [n for n, good in GOOD.items() if n in out and not good(out[n])]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
