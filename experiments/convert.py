"""Checkpoints from one form to another.

``python -m experiments.convert --checkpoint=SOURCE --to=FOLDER [--family=llama] [--as=huggingface|run|peft]``

SOURCE is a training run's folder, a Hugging Face folder, a GGUF file or a name (``smollm2-135m``). ``huggingface`` (the
default) writes config.json, model.safetensors, generation_config.json and the tokenizer, such that `transformers` loads
them, adapters merged; ``run`` a folder of this library (Orbax), for ``--checkpoint`` of any command here; ``peft`` the
adapters alone, as Hugging Face's PEFT loads them.
"""

from __future__ import annotations

from experiments import cli
from experiments.commands.convert import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
