"""Compiles a config's step for a slice of TPUs that need not be here, and says what it costs there.

``python -m experiments.compile --config=configs/X.py:paper --topology=v5e:8x8 [--step=train|decode|prefill]``
``python -m experiments.compile --base=llama3_70b [--topology=v5p:8x8x16]``
``python -m experiments.compile --all [--missing] [--only=NAME,NAME]``

The second form takes an architecture of ``configs/bases`` with the slice and the batch that its file names. The third
makes every certificate that configs name again, ``--missing`` those that are absent or of another config, and then
``docs/certificates.md``. Prints, and with ``--out`` writes as JSON: parameters, bytes per chip against the chip's
memory, FLOPs by formula and compiled, memory traffic, collectives, the time that each resource needs at least, and what
follows from it.

``--step``: one training step (the default where the config trains), the step that decodes one token, or the reading
of prompts, of `--batch` texts of `--length` tokens (default: the longest that the config reads), from `--weights`
(bfloat16, float32, or the config's) and with the cache as it is or in int8 (`--quantize`). `--mesh=fsdp=8,tensor=-1`
is the layout; for training any key can be set as for experiments.run: ``--config.train.mesh.fsdp=-1``
``--config.train.batch=64``. ``--search`` tries layouts of data, fsdp, expert, sequence and tensor, with and without
remat, in one to sixteen parts; skips what the estimate says is hopeless, compiles the `--tries` most promising and
ranks those that fit. The exit code is 1 for a step that does not fit. Needs the extra ``aot``, except for
``--estimate``: memory by arithmetic, in seconds.
"""

from __future__ import annotations

from experiments import cli
from experiments.certificates.compile import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
