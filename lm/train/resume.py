"""The state that a run begins with: its newest sound checkpoint's, else the initial one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from lm.model import params
from lm.train.checkpoint import Checkpoints
from lm.train.placement import Placement
from lm.train.run import Run
from lm.train.step import Beside, State, draws, initial


def begin(
    run: Run, placement: Placement, checkpoints: Checkpoints, tell: Callable[[str], None]
) -> tuple[State, int, Beside]:
    """(state, number of steps done, what steps read and never change)."""
    train, rng = run.train, jax.random.key(run.seed)
    start, base = _host_arrays(run.start.params), None
    if train.surgery.adds:
        start = params.init(run.cfg, rng) if start is None else start
        base = start = jax.device_put(start, placement.shardings(start))
    models = tuple((name, frozen.model) for name, frozen in run.models.items())
    beside = Beside(base, {name: frozen.params for name, frozen in run.models.items()}, models)
    if models:
        beside = jax.device_put(beside, placement.beside(beside))

    def fresh(start: Mapping[str, object] | None) -> State:
        whole = params.init(run.cfg, rng) if start is None else start
        seed = run.seed if draws(run.cfg, train) else None
        return initial(run.cfg, train, train.surgery.init(run.cfg, whole, rng), seed)

    shapes = jax.eval_shape(fresh, start)
    where = placement.shardings(shapes)
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, where)
    saved = checkpoints.newest(like, run.check_same, tell)
    if saved is None:
        return jax.jit(fresh, out_shardings=where)(start), 0, beside
    done, state = saved
    if done < train.steps:
        tell(f"going on from step {done} of {run.folder}")
    return state, done, beside


def _host_arrays(start: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """Parameters that every process has read by itself, as host arrays, which can be put on the devices of all."""
    leaves = jax.tree.leaves(start)
    if jax.process_count() > 1 and all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in leaves):
        host: Mapping[str, object] | None = jax.device_get(start)
        return host
    return start
