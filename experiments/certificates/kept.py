"""The committed certificates: which there must be, whether they are still of their configs, and their table.

A config lists in ``CERTIFIED`` what its ``:paper`` scale is certified for, ``{"step", "arm", "topology"}`` and for
generation ``"length"``, ``"batch"`` and whatever else ``experiments.compile`` takes; an architecture of
``configs/bases`` is certified for a training step on its ``POD``. ``python -m experiments.compile --all`` makes all of
them, ``python -m experiments.certificates`` only writes their table again, ``docs/certificates.md``.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.certificates import command
from experiments.certificates.text import GIB, where
from experiments.running.cache import write_json
from experiments.running.plan import Plan, prepare
from experiments.spec import registry
from lm.aot import chips
from lm.errors import UserError, unknown
from lm.files import write_text
from lm.model import params
from lm.train.config import TrainConfig

FOLDER = registry.ROOT / "benchmarks" / "certificates"
PAGE = registry.ROOT / "docs" / "certificates.md"
SCALE = "paper"


@dataclass(frozen=True)
class Wanted:
    """One certificate that there must be: `entry` of a config, or of a base."""

    name: str
    base: bool
    entry: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"{self.name}.json" if self.base else f"{self.name}-{SCALE}.json"

    def settings(self) -> Mapping[str, Any]:
        if self.base:
            return command.base(self.name)[0]
        return registry.load(registry.CONFIGS / f"{self.name}.py").settings(SCALE)

    def arguments(self) -> argparse.Namespace:
        """What the command would be given."""
        known = vars(command.parse(["--base=any"]))
        wrong = sorted(set(self.entry) - set(known))
        if wrong:
            raise UserError(f"{self.name}: CERTIFIED: {wrong[0]}: unknown key; valid: {', '.join(sorted(known))}")
        return argparse.Namespace(**{**known, **self.entry})


def wanted(only: str | None = None) -> list[Wanted]:
    """All of them, bases first; those of some names. Raises `UserError` for another name."""
    found = []
    for path in registry.files(registry.CONFIGS / "bases"):
        try:
            pod = registry.base(path.stem, "--only").POD
        except UserError:  # sizes that experiments share, no published model
            continue
        found.append(Wanted(path.stem, True, {"step": "train", "arm": "base", "topology": pod}))
    for path in registry.files():
        source = registry.load(path)
        if SCALE in source.scales:
            found += [Wanted(path.stem, False, entry) for entry in source.certified]
    names = list(dict.fromkeys(w.name for w in found))
    chosen = names if only is None else [n.strip() for n in only.split(",")]
    for name in chosen:
        if name not in names:
            raise unknown("--only", name, names)
    return [w for w in found if w.name in chosen]


def committed(file: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The certificates in a file; none where there is no file."""
    path = folder / file
    if not path.is_file():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    return list(data["certificates"]) if "certificates" in data else [data]


@functools.lru_cache(maxsize=32)
def _plan(name: str, base: bool) -> Plan:
    return prepare(Wanted(name, base, {}).settings(), [], None, absent_is_fine=True)


def facts(one: Wanted) -> dict[str, Any]:
    """What the certificate must say, by arithmetic: sizes, layout, and the number of parameters."""
    args = one.arguments()
    step, name, arm, said = command.picked(_plan(one.name, one.base), args.arm, args.step)
    n = chips.count(args.topology)
    out: dict[str, Any] = {"config": said, "arm": name, "step": step, "topology": args.topology, "chips": n}
    if step == "train":
        cfg, train = command.trained(arm, args.mesh)
        assert isinstance(train, TrainConfig)
        of = {"batch": train.batch, "accumulate": train.accumulate, "seq_len": train.data.seq_len}
        out |= {"train": of, "remat": cfg.remat, "mesh": train.mesh.sizes(n)}
    else:
        asked = command.serve(args, arm)
        cfg = asked.model(arm.config)
        kept: dict[str, Any] = {"batch": asked.batch, "length": asked.length, "quantize": asked.quantize}
        out |= {"serve": kept, "mesh": asked.mesh.sizes(n)}
    return {**out, "parameters": params.count(params.abstract(cfg))}


def find(one: Wanted, folder: Path = FOLDER) -> tuple[dict[str, Any] | None, str]:
    """The committed certificate of `one`, and why it is not of today's config ("" where it is, or there is none)."""
    expected = facts(one)
    for found in committed(one.file, folder):
        if all(found.get(key, "train") == expected[key] for key in ("arm", "step", "topology")):
            # Certificates of before there were steps are of training.
            wrong = [key for key in expected if found.get(key, "train") != expected[key]]
            told = [f"{key} is {found.get(key)} there and {expected[key]} now" for key in wrong]
            return found, "; ".join(told)
    return None, ""


def make(only: str | None, missing: bool) -> int:
    """Compiles all certificates, or those that are missing, into their files; prints their table, writes the page."""
    todo = wanted(only)
    good = True
    for file in dict.fromkeys(w.file for w in todo):
        for one in [w for w in todo if w.file == file]:
            found, why = find(one)
            if missing and found is not None and not why:
                continue
            start = time.perf_counter()
            print(f"\n{one.name}: {dict(one.entry)}", flush=True)
            content, fits = command.report(one.settings(), [], one.arguments())
            good &= fits
            keep(one, content)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print("\n" + "\n".join(rows(todo)))
    write_text(PAGE, page())
    return 0 if good else 1


def keep(one: Wanted, content: dict[str, Any], folder: Path = FOLDER) -> None:
    """Puts a certificate into its file, in the place of the one it follows, in the order of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    if one.base:
        write_json(folder / one.file, content)
        return
    mine = [w for w in wanted(one.name) if not w.base]
    kept = []
    for w in mine:
        if w == one:
            kept.append(content)
        elif (found := find(w, folder)[0]) is not None:
            kept.append(found)
    write_json(folder / one.file, {"config": f"{one.name}:{SCALE}", "certificates": kept})


COLUMNS = {
    "train": "of, arm, slice, layout, rows x tokens and parts, in Pallas kernels, memory GiB, FLOPs by formula, "
    "compiled / formula, arithmetic s, memory s, links s, MFU at most",
    "decode": "of, arm, slice, layout, texts x tokens, cache GiB, memory GiB, compiled / formula, arithmetic ms, "
    "memory ms, links ms, a token ms",
    "prefill": "of, arm, slice, layout, texts x tokens, in Pallas kernels, cache GiB, memory GiB, compiled / formula, "
    "arithmetic s, memory s, links s, a prompt s",
}
TITLES = {"train": "Training steps", "decode": "Decoding", "prefill": "Reading prompts"}


def rows(which: Sequence[Wanted], folder: Path = FOLDER) -> list[str]:
    """Tables of the committed ones among `which`, a table for each step."""
    certificates = []
    for one in which:
        found = find(one, folder)[0]
        if found is not None:
            certificates.append(found)
    out: list[str] = []
    for step, columns in COLUMNS.items():
        of = [c for c in certificates if c.get("step", "train") == step]
        if of:
            names = columns.split(", ")
            head = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
            out += ["", f"## {TITLES[step]}", "", *head, *(_row(c, step) for c in of)]
    return out[1:]


def _row(one: Mapping[str, Any], step: str) -> str:
    of = one["train" if step == "train" else "serve"]
    memory, ratio = one["memory"], one["flops"].get("ratio") if "flops" in one else None
    kernels = one.get("flops", {}).get("kernels")
    share = f"{kernels / one['flops']['compiled']:.0%}" if kernels else "none"
    cells = [f"`{one['config']}`", one["arm"], one["topology"], where(one)]
    if step == "train":
        cells += [f"{of['batch']:,} x {of['seq_len']:,}, {of['accumulate']}", share]
    else:
        cache = one["state"]["cache"] / GIB
        cells += [f"{of['batch']:,} x {of['length']:,}", *([share] if step == "prefill" else [])]
        cells += [f"{cache:.2f}" if cache >= 0.1 else f"{cache:.4f}"]
    cells.append(f"{memory['peak'] / GIB:.2f} of {one['hbm'] / GIB:.1f}" if "peak" in memory else "does not fit")
    cells += [f"{one['flops']['analytic']:.3g}"] if step == "train" else []
    cells.append("" if ratio is None else f"{ratio:.2f}")
    times = 1e3 if step == "decode" else 1.0
    cells += [f"{times * one['seconds'][name]:.3g}" for name in ("compute", "hbm", "ici")]
    cells.append(f"{one['mfu_ceiling']:.0%}" if step == "train" else f"{times * one['least_seconds']:.3g}")
    return "| " + " | ".join(cells) + " |"


def page(folder: Path = FOLDER) -> str:
    """``docs/certificates.md``."""
    return "\n".join([INTRO, *rows(wanted(), folder), ""])


INTRO = """# Certificates

Written by `python -m experiments.certificates` from `benchmarks/certificates`. `python -m experiments.compile --all`
compiles all of them again, `--all --missing` those that are absent or of another config.

Each row is the program that the TPU's own compiler makes of a config's step for a slice, on a machine without TPUs;
nothing here was run on one. Memory is a chip's peak by the compiler. Seconds are what each resource alone needs at
least, at the public rates of the chips, for that program: its products (arithmetic), what passes between a chip and
its memory (memory), and its links. FLOPs by formula are what the model needs. Compiled over formula is above 1 where
the program computes again (`model.remat`: up to a third more) or computes what a mask discards, and below 1 where it
skips what the formula counts. MFU at most is the formula's arithmetic at full rate over the time of the slowest
resource. Decoding is one token of every text with full caches; a prompt is read in one piece of 4,096 tokens and
others of 256, each attending to the whole cache. In Pallas kernels: their share of the compiled
FLOPs, as `model.mixer.backend=auto` takes them in programs for TPUs; none where one token is decoded with a cache
that is read whole.
"""


def run(argv: Sequence[str]) -> int:
    parser = cli.Parser("python -m experiments.certificates", __doc__)
    _, strange = parser.parse_known_args(argv)
    parser.refuse(strange)
    write_text(PAGE, page())
    print("\n".join(rows(wanted())))
    return 0
