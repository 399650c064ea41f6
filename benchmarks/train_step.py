"""One training step of a small Llama, here and in PyTorch with transformers: speed, memory, time to the first step.

    python -m benchmarks.train_step [--rounds=8] [--dtype=float32] [--pieces] [--out=FILE.json]

Both start from the same weights file and read the same random tokens; the losses of the first steps must agree. Each
contestant is a process of its own that the others take turns with, so that a slow minute of the machine hits all.
Without PyTorch only our numbers are printed. On a busy machine look at the processor time per step beside the wall
time: PyTorch's threads wait for each other after every operation, and lose more to a neighbour than XLA's do.
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

import numpy as np

from lm.files import write_json

ROOT = Path(__file__).resolve().parents[1]
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
BATCH, LENGTH = 16, 256
AGREE = 1e-4  # how far the losses of the first steps may differ, nats per token, float32
REST = 0.3  # seconds between turns: the threads of the last one stop spinning


@dataclass
class Contestant:
    """A worker process (`benchmarks.train_step_worker`) and what it measured."""

    kind: str
    label: str
    process: Any = None
    first_step_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    rounds_ms: list[list[float]] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    def start(self, weights: Path, options: argparse.Namespace, cache: Path | None = None) -> dict[str, Any]:
        """Spawns the worker; returns its first answer, which comes after the first step."""
        command = [sys.executable, "-m", "benchmarks.train_step_worker", self.kind, str(weights)]
        command += [f"--threads={options.threads}", f"--dtype={options.dtype}", f"--scan={int(options.scan)}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if options.huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        start = time.perf_counter()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        first = self._answer()
        self.first_step_s = time.perf_counter() - start
        self.losses = first.get("losses", [])
        return first

    def steps(self, n: int) -> dict[str, Any]:
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.label} worker ended with code {self.process.wait()}")
        return json.loads(line)

    def summary(self) -> dict[str, Any]:
        times = [t for r in self.rounds_ms for t in r]
        median = statistics.median(times)
        return {
            "ms_per_step": {"median": median, "min": min(times), "n": len(times)},
            "cpu_ms_per_step": {"median": statistics.median(self.cpu_ms), "min": min(self.cpu_ms)},
            "tokens_per_s": 1e3 * BATCH * LENGTH / median,
            "peak_mib": self.peak_mib,
            "first_step_s": self.first_step_s,
        }


def write_weights(folder: Path, seed: int = 0) -> None:
    """A Hugging Face directory with random weights of `MODEL`: what both sides can read."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    D, F, V = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    shapes: dict[str, tuple[Any, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(MODEL["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{layer}{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    weights = {
        name: np.ones(s, np.float32) if len(s) == 1 else rng.normal(0, 0.02, s).astype(np.float32)
        for name, s in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all contestants; returns what is printed last."""
    ours = Contestant("ours", f"Decoder Lab {options.dtype}")
    peers = [Contestant("torch", "PyTorch float32"), Contestant("torch-bf16", "PyTorch bf16 autocast")]
    missing = [name for name in ("torch", "transformers") if util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: no peer, only our own numbers")
        peers = []
    everyone = [ours, *peers]
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as tmp:
        weights = Path(tmp) / "weights"
        write_weights(weights)
        starts = {}
        for name in ("empty cache", "filled cache"):
            probe = Contestant("ours", "Decoder Lab")
            probe.start(weights, options, cache=Path(tmp) / "cache")
            starts[name] = probe.first_step_s
            probe.stop()
        pieces = {}
        if options.pieces:
            probe = Contestant("pieces", "Decoder Lab")
            pieces = probe.start(weights, options)
            probe.stop()
        try:
            for c in everyone:
                c.start(weights, options)
                c.losses += c.steps(2)["losses"]
            for _ in range(options.rounds):
                for c in everyone:
                    time.sleep(REST)
                    answer = c.steps(options.steps)
                    c.rounds_ms.append(answer["ms"])
                    c.cpu_ms.append(answer["cpu_ms"])
                    c.peak_mib = answer["peak_mib"]
        finally:
            for c in everyone:
                c.stop()
    load = [before, os.getloadavg()[0] if before is not None else None]
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "schema": 1,
        "settings": {
            **{k: getattr(options, k) for k in ("rounds", "steps", "dtype", "threads", "scan", "huge_pages")},
            **_sizes(),
        },
        "contestants": {c.label: c.summary() for c in everyone},
        "first_step_s": {"without cache": ours.first_step_s, **starts},
        "pieces_ms": pieces,
        "losses": {c.label: c.losses for c in everyone},
        "environment": {**_environment(), "load_average_before_and_after": load},
    }
    for peer in peers:
        pairs = zip(ours.rounds_ms, peer.rounds_ms, strict=True)
        ratios = [statistics.median(b) / statistics.median(a) for a, b in pairs]
        result.setdefault("ratio", {})[peer.label] = {
            "speed": statistics.median(ratios),
            "speed_lowest": min(ratios),
            "speed_highest": max(ratios),
            "processor_time": statistics.median(peer.cpu_ms) / statistics.median(ours.cpu_ms),
            "memory": ours.peak_mib / peer.peak_mib,
            "loss_difference": max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True)),
        }
    return result


def show(result: dict[str, Any]) -> None:
    s = result["settings"]
    print(
        f"Llama, {s['hidden_size']} wide, {s['num_hidden_layers']} layers, vocabulary {s['vocab_size']}; "
        f"{BATCH} x {LENGTH} tokens, AdamW, {s['threads']} threads; {s['rounds']} rounds of {s['steps']} steps in turns"
    )
    print(f"{'':24}{'tokens/s':>10}{'ms/step':>10}{'best ms':>10}{'CPU ms':>10}{'peak MiB':>10}{'first step s':>14}")
    for label, c in result["contestants"].items():
        ms = c["ms_per_step"]
        print(
            f"{label:24}{c['tokens_per_s']:10.0f}{ms['median']:10.1f}{ms['min']:10.1f}"
            f"{c['cpu_ms_per_step']['median']:10.0f}{c['peak_mib']:10.0f}{c['first_step_s']:14.1f}"
        )
    for label, r in result.get("ratio", {}).items():
        spread = f"{r['speed_lowest']:.2f} to {r['speed_highest']:.2f} by round"
        print(
            f"against {label}: {r['speed']:.2f}x the speed ({spread}), {r['processor_time']:.2f}x per processor "
            f"second, {r['memory']:.2f}x the memory, losses within {r['loss_difference']:.1e}"
        )
    starts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["first_step_s"].items())
    print(f"process start to the end of our first step: {starts}")
    total = sum(result["pieces_ms"].values())
    for name, ms in result["pieces_ms"].items():
        print(f"  {name:32}{ms:8.1f} ms{100 * ms / total:6.0f} %")


def _sizes() -> dict[str, Any]:
    return {"batch": BATCH, "length": LENGTH, **MODEL}


def _environment() -> dict[str, Any]:
    names = [n for n in ("jax", "jaxlib", "flax", "optax", "torch", "transformers") if util.find_spec(n)]
    out = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count(), **out}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns every contestant takes")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores each may use")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="our compute type")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True, help="scan over the layers")
    parser.add_argument("--pieces", action="store_true", help="also time the pieces of our step")
    parser.add_argument("--huge-pages", action="store_true", help="glibc's malloc asks for huge pages, for all")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    options = parser.parse_args(argv)
    if min(options.rounds, options.steps, options.threads) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    result = compare(options)
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
    print(json.dumps(result))
    peer = result.get("ratio", {}).get("PyTorch float32")
    if peer is not None and options.dtype == "float32" and peer["loss_difference"] > AGREE:
        print(f"error: the losses differ by {peer['loss_difference']:.1e}, more than {AGREE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
