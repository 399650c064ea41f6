"""What reading a checkpoint takes: its own bytes and little beside, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from lm.interop.readers.memory import Memory

ROOT = Path(__file__).resolve().parents[3]
# As many tensors as a Llama of 7B has, and a tenth of its width.
WIDTH, HIDDEN, LAYERS, VOCAB = 640, 1728, 32, 8000
MOST = 1.15  # times the checkpoint's bytes
# The peak of this very program: `ru_maxrss` begins with that of the process that started it.
MEASURE = """
import sys
import jax
from lm import interop
from lm.model import params

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

change = {"scan_layers": sys.argv[3] == "stacked"}
header = interop.load(sys.argv[1], dtype=sys.argv[2], overrides=change, load_params=False)
params.abstract(header.config)  # the model's plugs are imported by now
before = peak()
found = interop.load(sys.argv[1], dtype=sys.argv[2], overrides=change)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
print((peak() - before) / size, size)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(jnp.bfloat16)

    def tensor(*shape: int) -> np.ndarray:
        return np.resize(noise, shape)

    held = {
        "model.embed_tokens.weight": tensor(VOCAB, WIDTH),
        "lm_head.weight": tensor(VOCAB, WIDTH),
        "model.norm.weight": tensor(WIDTH),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        held |= {f"{at}.self_attn.{n}_proj.weight": tensor(WIDTH, WIDTH) for n in "qkvo"}
        held |= {f"{at}.mlp.{n}_proj.weight": tensor(HIDDEN, WIDTH) for n in ("gate", "up")}
        held[f"{at}.mlp.down_proj.weight"] = tensor(WIDTH, HIDDEN)
        held |= {f"{at}.{n}_layernorm.weight": tensor(WIDTH) for n in ("input", "post_attention")}
    assert len(held) == 291
    save_file(held, path / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 10,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 256,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("dtype", "form"), [("stored", "stacked"), ("bfloat16", "layers"), ("float32", "stacked")], ids=str
)
def test_reading_takes_the_checkpoints_bytes(folder: Path, dtype: str, form: str) -> None:
    args = [sys.executable, "-c", MEASURE, str(folder), dtype, form]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    times, size = (float(x) for x in made.stdout.split())
    assert size == 337_757_440 * (2 if dtype == "float32" else 1)
    assert times < MOST, f"{times:.3f} times the checkpoint's bytes"


def test_every_device_gets_its_part() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    want = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    leaf = jax.ShapeDtypeStruct(want.shape, jnp.bfloat16)
    for spec in (PartitionSpec(None, "a", "b"), PartitionSpec(None, None, "a"), PartitionSpec(None, ("a", "b"))):
        memory = Memory(leaf, NamedSharding(mesh, spec))
        for i in range(3):
            if i == 1:  # in pieces along either axis
                memory.put((i,), want[i, :3], (0, 0))
                memory.put((i,), want[i, 3:, :5], (3, 0))
                memory.put((i,), want[i, 3:, 5:], (3, 5))
            else:
                memory.put((i,), want[i])
        made = memory.array()
        assert made.sharding.spec == spec and made.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(made, np.float32), want)
