"""Generation with SmolLM2-135M, batch 1: here, in transformers, and in llama.cpp. Time per token by length and cache.

    python -m benchmarks.decode [--rounds=3] [--new=128] [--prefill=4096] [--lengths=1024,8192,32768] [--out=FILE.json]

Everybody holds the same weights (llama.cpp at 4 bits, as the GGUF file has them) and answers in turns with the others,
each in a process of its own; the first answer, which compiles, is not counted. Greedy texts of ours and transformers
must agree. Then one-token steps behind a cache of each length: full, and LM-Infinite's, whose size stops growing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

from lm.files import write_json

ROOT = Path(__file__).resolve().parents[1]
REST = 0.5  # seconds between turns
NEEDS = {"ours": (), "ours-int8": (), "huggingface": ("torch", "transformers"), "llama-cpp": ("llama_cpp",)}
LABELS = {
    "ours": "Decoder Lab float32",
    "ours-int8": "Decoder Lab int8 weights",
    "huggingface": "transformers float32",
    "llama-cpp": "llama.cpp Q4_1",
}


@dataclass
class Contestant:
    """A worker process and its answers."""

    kind: str
    process: Any = None
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def start(self, weights: Path, prompt: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.decode_worker", self.kind, str(weights), str(prompt)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*command, f"--threads={threads}"], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )
        self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the worker {self.kind} ended with code {self.process.wait()}")
        return json.loads(line)


def materials(folder: Path, prefill: int) -> tuple[dict[str, Path], Path]:
    """The checkpoint as each kind wants it, and the prompts' token ids."""
    from benchmarks.decode_worker import PROMPT
    from lm import interop
    from lm.data import texts
    from lm.interop.writers import to_huggingface

    found = interop.load("smollm2-135m")
    gguf = interop.find("smollm2-135m")
    to_huggingface.write(folder / "hf", found.config, found.params, found.text)
    assert found.tokenizer is not None
    book = texts.documents("kjv:Genesis")[0].text
    ids = {
        "short": list(found.tokenizer.encode(PROMPT)),
        "long": list(found.tokenizer.encode(book[: 8 * prefill]))[:prefill],
    }
    (folder / "prompt.json").write_text(json.dumps(ids), encoding="utf-8")
    weights = {kind: folder / "hf" for kind in NEEDS} | {"llama-cpp": gguf}
    return weights, folder / "prompt.json"


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everybody who is installed; returns what is printed last."""
    missing = {kind: [m for m in needs if util.find_spec(m) is None] for kind, needs in NEEDS.items()}
    for kind, names in missing.items():
        if names:
            print(f"{LABELS[kind]}: {', '.join(names)} not installed, left out")
    everyone = {kind: Contestant(kind) for kind in NEEDS if not missing[kind]}
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    tasks = [{"greedy": options.new}, {"prefill": options.prefill}]
    lengths: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as tmp:
        weights, prompt = materials(Path(tmp), options.prefill)
        try:
            for kind, c in everyone.items():
                c.start(weights[kind], prompt, options.threads)
                for task in tasks:
                    c.ask(**task)
            for _ in range(options.rounds):
                for task in tasks:
                    for c in everyone.values():
                        time.sleep(REST)
                        c.answers.setdefault(next(iter(task)), []).append(c.ask(**task))
            for kind in ("huggingface", "llama-cpp"):
                if kind in everyone:
                    everyone[kind].stop()
            for kind in ("ours", "ours-int8"):
                for length in options.lengths:
                    for pattern in ("causal", "lm_infinite"):
                        time.sleep(REST)
                        got = everyone[kind].ask(decode=length, pattern=pattern, steps=options.steps)
                        row = {"weights": kind, "tokens": length, "pattern": pattern, "cache_mib": got["cache_mib"]}
                        lengths.append({**row, "ms": statistics.median(got["ms"]), "ms_all": got["ms"]})
                everyone[kind].stop()  # its memory is the next one's
        finally:
            for c in everyone.values():
                if c.process.poll() is None:
                    c.stop()
    load = [before, os.getloadavg()[0] if before is not None else None]
    return {
        "benchmark": "decode",
        "schema": 1,
        "settings": {k: getattr(options, k) for k in ("rounds", "new", "prefill", "lengths", "steps", "threads")},
        "contestants": {LABELS[k]: _summary(c, options) for k, c in everyone.items()},
        "ratio": _ratios(everyone),
        "same_greedy_text": _agreement(everyone),
        "lengths": lengths,
        "environment": {**_environment(), "load_average_before_and_after": load},
    }


def _summary(c: Contestant, options: argparse.Namespace) -> dict[str, Any]:
    def median(task: str, key: str) -> float:
        return statistics.median(a[key] for a in c.answers[task])

    return {
        "greedy_tokens_per_s": options.new / median("greedy", "seconds"),
        "greedy_cpu_ms_per_token": 1e3 * median("greedy", "cpu_seconds") / options.new,
        "prefill_seconds": median("prefill", "seconds"),
        "prefill_tokens_per_s": options.prefill / median("prefill", "seconds"),
        "peak_mib": max(a["peak_mib"] for answers in c.answers.values() for a in answers),
        "seconds": {task: [a["seconds"] for a in answers] for task, answers in c.answers.items()},
    }


def _ratios(everyone: dict[str, Contestant]) -> dict[str, Any]:
    """Speed of ours over each peer's, by round: median, lowest, highest."""
    out: dict[str, Any] = {}
    for ours in ("ours", "ours-int8"):
        for peer, theirs in everyone.items():
            if peer == ours or peer == "ours-int8":
                continue
            for task in ("greedy", "prefill"):
                pairs = zip(everyone[ours].answers[task], theirs.answers[task], strict=True)
                r = [b["seconds"] / a["seconds"] for a, b in pairs]
                name = f"{LABELS[ours]} over {LABELS[peer]}, {task}"
                out[name] = {"speed": statistics.median(r), "lowest": min(r), "highest": max(r)}
    return out


def _agreement(everyone: dict[str, Contestant]) -> dict[str, int]:
    """How many of the greedy tokens are transformers' own, from the first on."""
    if "huggingface" not in everyone:
        return {}
    want = everyone["huggingface"].answers["greedy"][0]["tokens"]
    out = {}
    for kind, c in everyone.items():
        got = c.answers["greedy"][0]["tokens"]
        same = [a == b for a, b in zip(got, want, strict=True)]
        out[LABELS[kind]] = same.index(False) if False in same else len(same)
    return out


def show(result: dict[str, Any]) -> None:
    s = result["settings"]
    print(f"SmolLM2-135M, batch 1, {s['threads']} threads, {s['rounds']} rounds in turns")
    prefill = f"prefill {s['prefill']}, s"
    print(f"{'':26}{'greedy tokens/s':>16}{'CPU ms/token':>14}{prefill:>16}{'peak MiB':>10}{'same text':>11}")
    for label, c in result["contestants"].items():
        same = result["same_greedy_text"].get(label)
        agreed = "" if same is None else f"{same} of {s['new']}"
        print(
            f"{label:26}{c['greedy_tokens_per_s']:16.1f}{c['greedy_cpu_ms_per_token']:14.1f}"
            f"{c['prefill_seconds']:16.2f}{c['peak_mib']:10.0f}{agreed:>11}"
        )
    for name, r in result["ratio"].items():
        print(f"{name}: {r['speed']:.2f}x ({r['lowest']:.2f} to {r['highest']:.2f} by round)")
    print("\nmilliseconds per token, and MiB of cache, by tokens in the text so far")
    rows = result["lengths"]
    print(f"{'':40}" + "".join(f"{n:>20,}" for n in s["lengths"]))
    for weights in ("ours", "ours-int8"):
        by: dict[str, list[float]] = {}
        for pattern in ("causal", "lm_infinite"):
            mine = [r for r in rows if r["weights"] == weights and r["pattern"] == pattern]
            by[pattern] = [r["ms"] for r in mine]
            cells = "".join(f"{r['ms']:11.1f} {r['cache_mib']:5.0f} MiB" for r in mine)
            print(f"{LABELS[weights] + ', ' + {'causal': 'full'}.get(pattern, pattern):40}{cells}")
        ratios = [a / b for a, b in zip(by["causal"], by["lm_infinite"], strict=True)]
        print(f"{'full over lm_infinite':40}" + "".join(f"{r:19.2f}x" for r in ratios))


def _environment() -> dict[str, Any]:
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "llama_cpp_python")
    out = {}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count(), **out}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns every contestant takes")
    parser.add_argument("--new", type=int, default=128, help="tokens of a greedy answer")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--lengths", default="1024,4096,8192,16384,32768,65536", help="cached tokens, with commas")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per length")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores each may use")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    options = parser.parse_args(argv)
    try:
        options.lengths = [int(n) for n in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: found {options.lengths!r}; valid: numbers with commas between them")
    if min(options.rounds, options.new, options.prefill, options.steps, options.threads, *options.lengths) < 1:
        parser.error("--rounds, --new, --prefill, --lengths, --steps and --threads must be at least 1")
    result = compare(options)
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
    print(json.dumps(result))
    same = result["same_greedy_text"].get(LABELS["ours"], options.new)
    if same < options.new:
        print(f"error: greedy texts part after {same} of {options.new} tokens", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
