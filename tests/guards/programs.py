"""Programs whose text, or whose numbers, a rebuilding must leave as they were; the recorder of both.

``python -m guards.programs`` (in ``tests/``) writes what the present code makes: ``programs-jaxVERSION.json``, sha256
of every program's StableHLO without locations and with functions numbered in order of appearance, and
``outputs.npz``, the results of those that are run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from guards import experiments, models

HERE = Path(__file__).parent


def stablehlo(lowered: Any) -> str:
    """The hash of a program: no locations, no name of a Python function."""
    text = lowered.as_text()
    text = re.sub(r"#loc.*|loc\(.*?\)", "", text)
    text = re.sub(r"module @[\w.]+", "module @m", text)
    names: dict[str, str] = {}
    text = re.sub(r"@([\w.]+)\(", lambda m: "@" + names.setdefault(m[1], f"f{len(names)}") + "(", text)
    text = re.sub(r"@([\w.]+)", lambda m: "@" + names.get(m[1], m[1]), text)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


Program = tuple[Callable[..., Any], tuple[Any, ...]]


def _forward(name: str) -> Program:
    cfg = models.model(name)
    return lambda p, t: models.logits(cfg, p, t), (models.params(cfg), models.TOKENS)


def _gradient(name: str) -> Program:
    cfg = models.model(name)

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sin(5 * models.logits(cfg, params, tokens)).mean()

    return jax.value_and_grad(loss), (models.params(cfg), models.TOKENS)


def _packed(name: str) -> Program:
    cfg = models.model(name)
    segments = jnp.asarray([[1] * 20 + [2] * 24, [1] * 30 + [2] * 14])
    return lambda p, t: models.logits(cfg, p, t, segments_BT=segments), (models.params(cfg), models.TOKENS)


FORWARD = {f"forward {name}": functools.partial(_forward, name) for name in models.CHANGES}
GRADIENT = {
    f"gradient {name}": functools.partial(_gradient, name)
    for name in ("dense", "blocked", "remat, unrolled", "lm_infinite", "longheads", "moe", "neox", "gpt2")
}
PACKED = {f"packed {name}": functools.partial(_packed, name) for name in ("dense", "blocked", "streaming", "moe")}
RUN: dict[str, Callable[[], Program]] = {**FORWARD, **GRADIENT, **PACKED}
DECODE = ("dense", "streaming", "longheads", "neox")


def hashes() -> dict[str, str]:
    """The hash of every program."""
    out = {}
    for name, make in RUN.items():
        fn, args = make()
        out[name] = stablehlo(jax.jit(fn).lower(*args))
    for name, lowered in {**models.steps(), **experiments.smoke()}.items():
        out[name] = stablehlo(lowered)
    return out


def outputs() -> dict[str, np.ndarray]:
    """Results: logits; of gradients the loss and every fourth leaf's first numbers; the logits of cached decoding."""
    out: dict[str, np.ndarray] = {}
    for name, make in RUN.items():
        fn, args = make()
        leaves = jax.tree.leaves(jax.jit(fn)(*args))
        out[name] = np.concatenate([np.asarray(x, np.float32)[(0,) * (np.ndim(x) > 2)].ravel()[:512] for x in leaves])
    for name in DECODE:
        out[f"decode {name}"] = models.decoded(models.model(name))
    return out


def processor() -> str:
    """Bits of results are those of a processor and of a version of jax."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"jax {jax.__version__}, " + hashlib.sha256(flags.encode()).hexdigest()[:16]


def main() -> None:
    file = HERE / f"programs-jax{jax.__version__}.json"
    file.write_text(json.dumps(hashes(), indent=1) + "\n")
    if "--outputs" in sys.argv:
        np.savez_compressed(HERE / "outputs.npz", processor=np.array(processor()), **outputs())
    (HERE / "results.json").write_text(json.dumps(experiments.keys(), indent=1) + "\n")
    print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
