"""Mixture-of-experts layer: the dropless dispatch against a dense layer with the same active FLOPs, and against
`transformers`' Mixtral block on PyTorch, in turns; memory of the dispatch by number of tokens and experts per token.

``python -m benchmarks.moe [--rounds=8] [--out=FILE]``. Every contestant is a process of its own on the same cores,
holds the same random weights (experts on both sides, so outputs and losses must agree) and takes turns: forward passes,
and forward with gradients of weights and input. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import write_json

D, F, E, K, TOKENS = 256, 512, 8, 2, 4096
REST = 0.2  # seconds between turns, so that one contestant's threads are asleep when the next starts
AGREE = 1e-4
MODES = ("forward", "gradient")
KINDS = ("dense", "dropless", "capacity", "ragged", "torch", "torch_grouped")
LABELS = {
    "dense": "dense layer, same active FLOPs",
    "dropless": "dropless dispatch",
    "capacity": "capacity dispatch (buffers, 1.25)",
    "ragged": "jax.lax.ragged_dot",
    "torch": "PyTorch Mixtral block",
    "torch_grouped": "PyTorch Mixtral block, grouped_mm",
}


def weights() -> dict[str, np.ndarray]:
    """float32: ``x [TOKENS, D]``, ``router [D, E]``, ``gate``, ``up [E, D, F]``, ``down [E, F, D]``."""
    rng = np.random.default_rng(0)
    shapes = {"x": (TOKENS, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {n: rng.normal(0, 1.0 if n == "x" else 0.06, s).astype(np.float32) for n, s in shapes.items()}


def layer(kind: str) -> tuple[Any, Any]:
    """Our layer ``(params, x[1, T, D]) -> y`` and its parameters."""
    import jax.numpy as jnp

    from lm.config import model_config
    from lm.ffn.context import Call

    w = weights()
    if kind == "dense":
        cfg = model_config({"d_model": D, "n_heads": 1, "d_ff": K * F, "vocab_size": 1})
        dense = cfg.ffn.module(cfg)
        params: Any = {n: {"kernel": jnp.asarray(np.concatenate(list(w[n][:K]), 1))} for n in ("gate", "up")}
        params["down"] = {"kernel": jnp.asarray(np.concatenate(list(w["down"][:K]), 0))}
        return (lambda p, x: dense.apply({"params": p}, x)), params
    moe: dict[str, Any] = {"name": "moe", "experts": E, "router": {"name": "topk", "k": K}}
    if kind == "capacity":
        moe |= {"capacity": 1.25, "eval_capacity": 1.25, "dispatch": "buffers"}
    if kind == "ragged":
        moe["implementation"] = "ragged"
    cfg = model_config({"d_model": D, "n_heads": 1, "d_ff": F, "vocab_size": 1, "ffn": moe})
    module = cfg.ffn.module(cfg)
    params = {"router": {"kernel": jnp.asarray(w["router"])}}
    params["experts"] = {n: {"kernel": jnp.asarray(w[n])} for n in ("gate", "up", "down")}

    def run(p: Any, x: Any) -> Any:
        index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return module.apply({"params": p}, x, Call(index))[0]

    return run, params


def ours(kind: str) -> dict[str, Callable[[], float]]:
    import jax
    import jax.numpy as jnp

    run, params = layer(kind)
    x = jnp.asarray(weights()["x"])[None]
    forward = jax.jit(run)
    loss = lambda p, x: jnp.square(run(p, x)).mean()  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def one() -> float:
        return float(jnp.square(jax.block_until_ready(forward(params, x))).mean())

    def both() -> float:
        return float(jax.block_until_ready(gradient(params, x))[0])

    return {"forward": one, "gradient": both}


def torch(kind: str, threads: int) -> dict[str, Callable[[], float]]:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(threads)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "grouped_mm" if kind == "torch_grouped" else "eager"
    block, w = MixtralSparseMoeBlock(config), {n: torch.from_numpy(v) for n, v in weights().items()}
    with torch.no_grad():
        block.gate.weight.copy_(w["router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([w["gate"], w["up"]], 2).transpose(1, 2))
        block.experts.down_proj.copy_(w["down"].transpose(1, 2))
    x = w["x"][None].clone().requires_grad_()

    def one() -> float:
        with torch.no_grad():
            return block(x).square().mean().item()

    def both() -> float:
        block.zero_grad(set_to_none=True)
        x.grad = None
        loss = block(x).square().mean()
        loss.backward()
        return loss.item()

    return {"forward": one, "gradient": both}


def worker(kind: str, threads: int) -> None:
    """Answers every line ``MODE N`` with the milliseconds of N runs and the value computed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    runs = torch(kind, threads) if kind.startswith("torch") else ours(kind)
    for line in sys.stdin:
        mode, n = line.split()
        times, value = [], 0.0
        for _ in range(int(n)):
            start = time.perf_counter()
            value = runs[mode]()
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"ms": times, "value": value}), flush=True)


class Contestant:
    def __init__(self, kind: str, threads: int) -> None:
        self.kind = kind
        self.rounds: dict[str, list[float]] = {m: [] for m in MODES}
        self.best: dict[str, float] = dict.fromkeys(MODES, float("inf"))
        self.value = 0.0
        command = [sys.executable, "-m", "benchmarks.moe", "--worker", kind, "--threads", str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parents[1]
        )

    def turn(self, mode: str, n: int, count: bool = True) -> None:
        self.process.stdin.write(f"{mode} {n}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.kind} worker ended with code {self.process.wait()}")
        answer = json.loads(line)
        self.value = answer["value"]
        if count:
            self.rounds[mode].append(statistics.median(answer["ms"]))
            self.best[mode] = min(self.best[mode], *answer["ms"])

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def memory() -> list[dict[str, Any]]:
    """Temporary memory of forward and gradient as XLA plans it, by tokens and experts per token."""
    import jax
    import jax.numpy as jnp

    from lm.config import model_config
    from lm.ffn.context import Call

    out = []
    for tokens, k in ((1024, 2), (2048, 2), (4096, 2), (8192, 2), (4096, 1), (4096, 4)):
        moe = {"name": "moe", "experts": E, "router": {"name": "topk", "k": k}}
        cfg = model_config({"d_model": D, "n_heads": 1, "d_ff": F, "vocab_size": 1, "ffn": moe})
        module = cfg.ffn.module(cfg)
        x = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
        index: Any = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        call = Call(index)
        p = jax.eval_shape(module.init, jax.random.key(0), x, call)

        def loss(p: Any, x: Any, call: Any, module: Any = module) -> Any:
            return jnp.square(module.apply(p, x, call)[0]).mean()

        planned: Any = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(p, x, call).compile().memory_analysis()
        size = planned.temp_size_in_bytes
        row = {"tokens": tokens, "k": k, "temp_mib": size / 2**20, "bytes_per_assignment": size / (tokens * k)}
        out.append({**row, "tec_mib": 4 * tokens * E * (tokens * k * 1.25 / E) / 2**20})
    return out


def compare(options: argparse.Namespace) -> dict[str, Any]:
    kinds = [k for k in KINDS if not k.startswith("torch") or all(util.find_spec(n) for n in ("torch", "transformers"))]
    before = os.getloadavg()[0]
    everyone = {k: Contestant(k, options.threads) for k in kinds}
    try:
        for c in everyone.values():
            for mode in MODES:
                c.turn(mode, 2, count=False)
        for _ in range(options.rounds):
            for mode in MODES:
                for c in everyone.values():
                    time.sleep(REST)
                    c.turn(mode, options.steps)
    finally:
        for c in everyone.values():
            c.stop()
    result: dict[str, Any] = {
        "benchmark": "moe",
        "schema": 1,
        "settings": {"d_model": D, "d_expert": F, "experts": E, "k": K, "tokens": TOKENS, **vars(options)},
        "ms": {
            k: {m: {"median": statistics.median(c.rounds[m]), "min": c.best[m]} for m in MODES}
            for k, c in everyone.items()
        },
        "values": {k: c.value for k, c in everyone.items()},
        "memory": memory(),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            **{n: metadata.version(n) for n in ("jax", "torch", "transformers") if util.find_spec(n)},
            "load_average_before_and_after": [before, os.getloadavg()[0]],
        },
    }
    result["settings"].pop("out"), result["settings"].pop("worker")

    def ratios(a: str, b: str, mode: str) -> dict[str, float]:
        """Time of `a` over time of `b`, round by round."""
        pairs = zip(everyone[a].rounds[mode], everyone[b].rounds[mode], strict=True)
        found = sorted(x / y for x, y in pairs)
        least = everyone[a].best[mode] / everyone[b].best[mode]
        return {"median": statistics.median(found), "lowest": found[0], "highest": found[-1], "of_minima": least}

    result["over_dense"] = {m: ratios("dropless", "dense", m) for m in MODES}
    result["torch_over_ours"] = {
        k: {m: ratios(k, "dropless", m) for m in MODES} for k in everyone if k.startswith("torch")
    }
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{TOKENS} tokens, {D} wide, {E} experts of {F}, {K} per token, float32")
    print(f"{'ms':40}" + "".join(f"{m + ' median':>18}{'min':>9}" for m in MODES))
    for kind, by_mode in result["ms"].items():
        print(f"{LABELS[kind]:40}" + "".join(f"{v['median']:18.1f}{v['min']:9.1f}" for v in by_mode.values()))
    for mode, r in result["over_dense"].items():
        print(f"dropless over dense, {mode}: {r['median']:.2f}x ({r['lowest']:.2f} to {r['highest']:.2f} by round)")
    for kind, by_mode in result["torch_over_ours"].items():
        for mode, r in by_mode.items():
            print(f"{LABELS[kind]} over dropless, {mode}: {r['median']:.2f}x ({r['lowest']:.2f} to {r['highest']:.2f})")
    for row in result["memory"]:
        print(
            f"  {row['tokens']:6} tokens, k {row['k']}: {row['temp_mib']:8.1f} MiB temporary, "
            f"{row['bytes_per_assignment']:8.0f} bytes per assignment; a float32 [T, E, C]: {row['tec_mib']:.0f} MiB"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.moe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns every contestant takes")
    parser.add_argument("--steps", type=int, default=5, help="runs of a turn")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores each may use")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.rounds, options.steps, options.threads) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    if options.worker:
        worker(options.worker, options.threads)
        return 0
    result = compare(options)
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
    print(json.dumps(result))
    apart = [v for k, v in result["values"].items() if k not in ("dense", "capacity")]
    if max(apart) - min(apart) > AGREE * max(apart):
        print(f"error: the contestants computed different values, {result['values']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
