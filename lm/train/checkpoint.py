"""Checkpoints by Orbax: asynchronous, committed by a rename, verified when read back.

A folder holds one subfolder per kept step with the whole state (parameters, optimizer, counters) and what it belongs to
(configuration, data order, fingerprints). A save that was interrupted is a temporary folder that is never read. A
checkpoint whose contents changed on disk is told, put aside (``damaged-STEP``) and the one before is used.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from lm.errors import TrainingStopped, UserError
from lm.files import summed, without_sum
from lm.sharding import processes
from lm.train.folder import CHECKPOINTS
from lm.train.quiet import quiet


class SaveFailed(TrainingStopped):
    """A checkpoint could not be written; the message says why, and what is the newest complete one."""


class Checkpoints:
    """The checkpoints of one run. `keep_last` newest stay, and those of every `keep_every` steps (0 = none)."""

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder.absolute()
        policies: list[Any] = [keep.LatestN(keep_last)]
        if keep_every:
            policies.append(keep.EveryNSteps(keep_every))
        self.options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self.about: dict[str, Any] = {}  # what the checkpoint that `newest` gave belongs to
        quiet()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as e:
            raise UserError(f"{self.folder}: cannot be written ({e.strerror or e}); valid: another --workdir") from None

    def _open(self) -> None:
        self.manager = ocp.CheckpointManager(self.folder, options=self.options)

    @property
    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Mapping[str, object], about: Mapping[str, Any]) -> None:
        """Starts writing; returns when the state may change again. Raises `SaveFailed`, also for an earlier save."""
        said = summed({**about, "step": step, "fingerprints": _marks(state)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(said))
        self._guard(step, lambda: self.manager.save(step, args=items, force=True))

    def wait(self) -> None:
        """Until everything is on disk; raises `SaveFailed`."""
        self._guard(None, self._finish)

    def _finish(self) -> None:
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def _guard(self, step: int | None, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as e:  # whatever the file system and the library's threads come up with
            left = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
            have = f"the last complete checkpoint is step {left[-1]}" if left else "there is no complete checkpoint"
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            free = shutil.disk_usage(self.folder).free / 2**20
            raise SaveFailed(
                f"{self.folder}: {what} cannot be written ({_first_line(e)}; {free:,.0f} MiB free on the disk); {have}"
            ) from e

    def newest(
        self, like: Mapping[str, object], check: Callable[[dict[str, Any]], None], tell: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest sound checkpoint's step and state, placed as `like` (arrays or shapes); None when there is none.

        `check(about)` may raise `UserError` for a checkpoint of something else. Damaged ones are told and put aside.
        """
        while (step := processes.shared(max(self.steps, default=None))) is not None:
            about, why = processes.shared(_about(self.folder, step) if jax.process_index() == 0 else None)
            if not why:
                check(about)
                state, why = self._state(step, like)
                # What one process cannot read is damaged for all, and nobody waits for it in a collective.
                why = next(filter(None, processes.everyones(why)), "")
            if not why:
                why = _difference(_marks(state), about["fingerprints"])
            if not why:
                self.about = about
                return step, state
            self._put_aside(step, why, tell)
        return None

    def _state(self, step: int, like: Mapping[str, object]) -> tuple[dict[str, Any], str]:
        """The state of `step`, and why it cannot be read.

        Orbax's manager is not asked: where reading fails in one process, its others wait for that one for minutes.
        """
        try:
            args = ocp.args.StandardRestore(_abstract(like))
            return ocp.StandardCheckpointHandler().restore(self.folder / str(step) / "state", args=args), ""
        except Exception as e:
            return {}, _first_line(e)

    def _put_aside(self, step: int, why: str, tell: Callable[[str], None]) -> None:
        older = [s for s in self.steps if s < step]
        then = f"using step {older[-1]}" if older else "starting from the beginning"
        aside = self.folder.parent / f"damaged-{step}"
        n = 1
        while aside.exists():
            n, aside = n + 1, self.folder.parent / f"damaged-{step}-{n}"
        self.manager.close()
        processes.meet()
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(aside)
        processes.meet()
        self._open()
        tell(f"{self.folder / str(step)}: damaged ({why}); moved to {aside.name}, {then}")

    def close(self) -> None:
        """Waits for what is being written; its failure has been told by `save` or `wait`, or comes too late."""
        with contextlib.suppress(Exception):
            self.manager.close()


def read_part(
    folder: Path, step: int, like: Mapping[str, object], check: Callable[[dict[str, Any]], None] = lambda about: None
) -> dict[str, Any]:
    """Of the state that the run in `folder` saved at `step`, what `like` (arrays or shapes) has, on the first device.

    Nothing else of the state is read. `check(about)` may raise `UserError` for a checkpoint of something else. Raises
    `UserError` for a checkpoint that cannot be read, that is not what was saved by its fingerprints, or that has more
    or less below the names of `like`.
    """
    quiet()
    about, why = _about(folder / CHECKPOINTS, step)
    if not why:
        check(about)
        part, why = _part(folder, step, like)
    if not why:
        names = [jax.tree_util.keystr((jax.tree_util.DictKey(name),)) for name in like]
        saved = {k: v for k, v in about["fingerprints"].items() if any(k.startswith(name) for name in names)}
        flat = jax.tree_util.tree_flatten_with_path(part)[0]
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in flat if isinstance(leaf, jax.Array)}
        why = _difference({name: _fingerprint(np.asarray(leaf)) for name, leaf in arrays.items()}, saved)
    if why:
        place = folder / CHECKPOINTS / str(step)
        raise UserError(
            f"{place}: damaged ({why}); valid: the files as they were saved; the training's own command puts "
            "it aside and goes on from the one before"
        )
    return part


def _part(folder: Path, step: int, like: Mapping[str, object]) -> tuple[dict[str, Any], str]:
    """That part of the state, and why it cannot be read."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    how = ocp.checkpoint_utils.construct_restore_args(placed)
    args = ocp.args.PyTreeRestore(item=placed, restore_args=how, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            part = reader.restore((folder / CHECKPOINTS / str(step) / "state").absolute(), args=args)
    except Exception as e:  # the library raises a dozen types for damaged files
        return {}, _first_line(e)
    return dict(part), ""


def _about(checkpoints: Path, step: int) -> tuple[dict[str, Any], str]:
    """What the checkpoint of `step` belongs to, and why it cannot be read or believed."""
    try:
        found = ocp.JsonCheckpointHandler().restore(checkpoints / str(step) / "about", args=ocp.args.JsonRestore())
        about = {**found, "fingerprints": {str(k): int(v) for k, v in found["fingerprints"].items()}}
    except Exception as e:  # any error of any reader: the file is not what was written
        return {}, _first_line(e)
    bare = without_sum(about)
    if bare is None:
        return {}, "what it belongs to is not what was saved"
    if bare.get("step", step) != step:
        return {}, f"it was saved at step {json.dumps(bare['step'])}"
    return bare, ""


def _difference(marks: Mapping[str, int], saved: Mapping[str, int]) -> str:
    """Which leaf is not what was saved, by fingerprints; empty where all are, and there are no others."""
    for name in sorted({*marks, *saved}):
        if name not in saved or name not in marks:
            return f"{name} is {'not there' if name in saved else 'more than was saved'}"
        if marks[name] != saved[name]:
            return f"{name} is not what was saved"
    return ""


def _marks(state: object) -> dict[str, int]:
    """Fingerprints by the leaf's place in the tree."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(_fingerprints(state)))[0]
    return {jax.tree_util.keystr(path): int(mark) for path, mark in flat}


@jax.jit
def _fingerprints(state: object) -> Any:
    """A uint32 per leaf that depends on every bit and its place, and not on how the leaf is spread over devices."""

    def one(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            words = x.astype(jnp.uint32)
        else:
            width = x.dtype.itemsize * 8
            words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        flat = words.reshape(-1)
        places = 2 * jax.lax.iota(jnp.uint32, flat.size) + 1  # odd, so that no bit is multiplied away
        return jnp.sum(flat * places, dtype=jnp.uint32)

    return jax.tree.map(one, state)


def _fingerprint(x: np.ndarray) -> int:
    """The same of one array of the host; nothing is compiled."""
    flat = np.ascontiguousarray(x).reshape(-1)
    words = flat if x.dtype == np.bool_ else flat.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))
    total, step = 0, 2**20  # few enough to stay in the cache
    odd = 2 * np.arange(min(step, words.size), dtype=np.uint32) + np.uint32(1)
    for i in range(0, words.size, step):
        piece = words[i : i + step].astype(np.uint32)
        places = odd[: piece.size] + np.uint32(2 * i % 2**32)
        total += int((piece * places).sum(dtype=np.uint32))
    return total % 2**32


def _abstract(like: object) -> Any:
    def shape(x: np.ndarray | jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if isinstance(x, np.ndarray) else x.sharding)

    return jax.tree.map(shape, like)


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines or [type(e).__name__])[0][:200]
