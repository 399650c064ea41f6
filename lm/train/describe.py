"""What a run writes about itself before its first step: ``parameters.txt``, ``run.json`` and its tokenizer."""

from __future__ import annotations

from lm.files import write_text
from lm.model import params
from lm.optimizers.base import n_bytes
from lm.train.folder import PARAMETERS, write_about
from lm.train.run import Run
from lm.train.step import Params, transformation


def describe(run: Run, trained: Params, base: Params, peak: str, flops_per_token: float) -> None:
    """`trained`: the parameters that training changes; `base`: those it adds to, or None; `peak`: where the peak
    performance of the device is known from."""
    size = n_bytes(transformation(run.cfg, run.train), trained)
    write_text(run.folder / PARAMETERS, _parameters(run, trained, base, size))
    about = {
        **run.about,
        "start_source": run.start.source,
        "start_content": run.start.content(),
        "peak": peak,
        "flops_per_token": flops_per_token,
        "optimizer_bytes": size,
    }
    write_about(run.folder, about, run.data.text)


def _parameters(run: Run, trained: Params, base: Params, optimizer_bytes: int) -> str:
    """A line for each parameter (name, shape, type, axes), and their number."""
    leaves, axes = params.names(trained), params.described(params.axes(run.cfg), trained)
    width = max(len(name) for name in leaves)
    rows = [f"{name:{width}}  {leaf.shape!s:22} {leaf.dtype!s:9} {axes[name]}" for name, leaf in leaves.items()]
    n = params.count(trained)
    beside = f" trained, beside {params.count(base):,} that stay" if base is not None else ""
    rows.append(
        f"{n:,} parameters{beside}; optimizer state {optimizer_bytes / 2**20:,.2f} MiB, "
        f"{optimizer_bytes / n:.3f} bytes per parameter"
    )
    return "\n".join(rows) + "\n"
