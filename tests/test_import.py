"""What an import may not do: load jax when nobody asked for it, need `flax.nnx`, or touch the network's libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_lm_loads_no_framework() -> None:
    heavy = ("jax", "jaxlib", "flax", "torch", "tensorflow", "transformers", "numpy")
    loaded = python(
        f"import sys, lm\n"
        f"print(sorted(m for m in {heavy} if m in sys.modules), [n for n in lm.__all__ if n in vars(lm)])"
    )
    assert loaded.split("\n")[0] == "[] []"


def test_the_library_runs_on_jax_and_flax_linen_alone() -> None:
    """Every module of `lm` imports, and the decoder runs, where `flax.nnx`, torch and tensorflow cannot be imported."""
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (ROOT / "lm").rglob("*.py")
    )
    assert "lm.model.decoder" in modules and "lm.patterns" in modules
    out = python(
        f"""
import importlib, sys
for name in ("flax.nnx", "torch", "tensorflow", "transformers"):
    sys.modules[name] = None  # `import name` now raises ImportError
for name in {modules}:
    importlib.import_module(name)
import jax, jax.numpy as jnp, lm
from lm.model import params
cfg = lm.model_config({{"d_model": 8, "n_heads": 2, "d_ff": 8}})
out = lm.Decoder(cfg).apply({{"params": params.init(cfg, jax.random.key(0))}}, lm.Inputs(jnp.zeros((1, 3), jnp.int32)))
print(out.logits_BTV.shape, jax.devices()[0].platform)
"""
    )
    assert out.startswith("(1, 3, 256)")


def test_importing_sets_nothing() -> None:
    """No flag, environment variable or global seed of NumPy changes by importing the library."""
    out = python(
        """
import os
import jax, numpy
before = (dict(os.environ), dict(jax.config.values), numpy.random.get_state()[1].tolist())
import lm.model.decoder, lm.model.params, lm.interop, lm.measures, lm.caches
after = (dict(os.environ), dict(jax.config.values), numpy.random.get_state()[1].tolist())
print([a == b for a, b in zip(before, after)])
"""
    )
    assert out.strip() == "[True, True, True]"
