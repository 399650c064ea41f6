"""One contestant of `benchmarks.train_step`: takes a step, then as many as every line on standard input asks for.

Answers with one JSON object per line: ``losses``, ``ms`` of every step, ``cpu_ms`` per step (all threads) and
``peak_mib``, the largest resident memory so far.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from benchmarks.train_step import BATCH, LENGTH, MODEL

RATE, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8


def batch(step: int) -> np.ndarray:
    """int32 ``[BATCH, LENGTH + 1]``: one of eight random batches."""
    rng = np.random.default_rng(step % 8)
    return rng.integers(0, MODEL["vocab_size"], (BATCH, LENGTH + 1), dtype=np.int32)


def ours(options: argparse.Namespace) -> Callable[[np.ndarray], float]:
    """The step of `lm.train`: decoder, causal objective and AdamW in one program that reuses its own buffers."""
    import jax
    import jax.numpy as jnp

    from lm import interop
    from lm.model.params import unstack
    from lm.optimizers.plain import AdamW
    from lm.optimizers.schedules import Constant
    from lm.train.config import TrainConfig
    from lm.train.placement import Placement
    from lm.train.step import ALONE, initial

    changes = {"dtype": options.dtype, "scan_layers": bool(options.scan)}
    loaded = interop.load(str(options.weights), overrides=changes)
    optimizer = AdamW(RATE, DECAY, b1=BETAS[0], b2=BETAS[1], eps=EPS)
    train = TrainConfig(batch=BATCH, optimizer=optimizer, schedule=Constant(), clip=None)
    params = jax.tree.map(jnp.asarray, loaded.params if options.scan else unstack(loaded.params))
    if options.kind == "pieces":
        _pieces(loaded.config, params, train)
    place = Placement(loaded.config, train)
    state = initial(loaded.config, train, params)
    held = [jax.device_put(state, place.shardings(state))]
    del state
    del params
    run: list[Any] = []

    def one(tokens: np.ndarray) -> float:
        rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((BATCH, LENGTH), np.float32)}
        data = place.batch(rows)
        if not run:
            run.append(place.compile(held[0], data))
        held[0], metrics = run[0](held[0], data, ALONE)
        return float(metrics["loss"])

    return one


def _pieces(cfg: Any, params: Any, train: Any) -> NoReturn:
    """Prints ``{piece: ms}`` and ends."""
    import jax
    import optax

    from benchmarks.train_step_pieces import measure
    from lm.train.step import transformation

    tx = transformation(cfg, train)
    held = [params, tx.init(params)]
    grads = jax.tree.map(lambda p: 0.01 * p, params)

    def move(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(move, donate_argnums=(0, 1))

    def update() -> Any:
        held[:] = run(*held, grads)
        return held

    print(json.dumps(measure(cfg, jax.tree.map(lambda p: p + 0, params), update, BATCH, LENGTH)))
    raise SystemExit(0)


def torch(options: argparse.Namespace) -> Callable[[np.ndarray], float]:
    """transformers' Llama with scaled_dot_product_attention and the fused AdamW of PyTorch."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(options.threads)
    model = LlamaForCausalLM.from_pretrained(str(options.weights), attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
    half = options.kind == "torch-bf16"

    def one(tokens: np.ndarray) -> float:
        data = torch.from_numpy(tokens).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = model(data[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), data[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def peak_mib() -> float:
    """Largest resident memory of this process, MiB. Unlike getrusage's, not the one before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.train_step_worker")
    parser.add_argument("kind", choices=("ours", "pieces", "torch", "torch-bf16"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scan", type=int, default=0)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    one = torch(options) if options.kind.startswith("torch") else ours(options)
    done, n = 0, 1
    while True:
        losses, times, cpu = [], [], time.process_time()
        for _ in range(n):
            tokens = batch(done)
            start = time.perf_counter()
            losses.append(one(tokens))
            times.append(1e3 * (time.perf_counter() - start))
            done += 1
        cpu = 1e3 * (time.process_time() - cpu) / n
        print(json.dumps({"losses": losses, "ms": times, "cpu_ms": cpu, "peak_mib": peak_mib()}), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        n = int(line)


if __name__ == "__main__":
    main()
