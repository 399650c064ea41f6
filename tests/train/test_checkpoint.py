"""A run's weights are read by one reader, which believes fingerprints and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import interop
from lm.errors import UserError
from lm.train import checkpoint
from lm.train.folder import CHECKPOINTS


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


def refused(run: Path) -> str:
    with pytest.raises(UserError) as e:
        interop.load(str(run))
    assert "\n" not in str(e.value) and str(run) in str(e.value)
    return str(e.value)


def test_fingerprints_of_the_host_are_those_of_devices() -> None:
    rng = np.random.default_rng(0)
    state = {
        "f32": jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32),
        "large": jnp.asarray(rng.normal(size=(2**20 + 3,)), jnp.float32),
        "bf16": jnp.asarray(rng.normal(size=(33, 2)), jnp.bfloat16),
        "i8": jnp.asarray(rng.integers(-128, 128, (9,)), jnp.int8),
        "bool": jnp.asarray([True, False, True]),
        "scalar": jnp.asarray(7, jnp.int32),
        "none": jnp.zeros((0, 4)),
    }
    want = checkpoint._marks(state)
    assert {f"['{k}']": checkpoint._fingerprint(np.asarray(v)) for k, v in state.items()} == want
    assert checkpoint._fingerprint(np.asarray(state["f32"])[::-1]) != want["['f32']"]


def test_exactly_the_same_leaves() -> None:
    assert checkpoint._difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) == ""
    assert checkpoint._difference({"a": 1}, {"a": 1, "b": 2}) == "b is not there"
    assert checkpoint._difference({"a": 1, "b": 2}, {"a": 1}) == "b is more than was saved"
    assert checkpoint._difference({"a": 1}, {"a": 2}) == "a is not what was saved"


def test_a_checkpoint_under_another_step_is_refused(run: Path) -> None:
    (run / CHECKPOINTS / "60").rename(run / CHECKPOINTS / "61")
    assert "damaged (it was saved at step 60)" in refused(run)


def test_a_checkpoint_of_another_run_is_refused(run: Path) -> None:
    """Each of the two is sound by itself."""
    about = json.loads((run / "run.json").read_text())
    from lm.files import summed

    (run / "run.json").write_text(json.dumps(summed({**about, "seed": 1})))
    assert "a checkpoint of another run, by seed: 0 there, 1 in run.json" in refused(run)
    (run / "run.json").write_text(json.dumps({**about, "seed": 1}))
    assert "run.json: was changed since training wrote it" in refused(run)
    bare = {k: v for k, v in about.items() if k not in ("sum", "files")}
    (run / "run.json").write_text(json.dumps(bare))
    interop.load(str(run))  # from before there were sums


def test_another_value_under_sound_files_is_refused(run: Path) -> None:
    """Orbax finds nothing wrong with a checkpoint that somebody wrote over."""
    loaded = interop.load(str(run)).params
    kept = checkpoint.Checkpoints(run / CHECKPOINTS)
    about, why = checkpoint._about(run / CHECKPOINTS, 60)
    assert not why
    state = {"params": jax.tree.map(lambda x: x + 1e-3, loaded)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_marks", lambda _: about["fingerprints"])
        kept.save(63, state, {**about, "step": 63})
        kept.wait()
    kept.close()
    assert "63: damaged (" in refused(run) and "is not what was saved" in refused(run)
