"""Text from a model, as it comes.

``python -m experiments.generate --checkpoint=smollm2-135m --prompt='Once upon a time' [--max-new-tokens=128]``

SOURCE is a name, a Hugging Face folder, a GGUF file or a training run's folder. Prompts come from ``--prompt`` (again
and again), ``--file=FILE`` (one prompt a line, ``-`` = standard input; ``--whole``: the file is one prompt).
``--chat`` puts each through the checkpoint's chat template. ``--pattern=lm_infinite`` reads with another attention
pattern, whose window follows the trained length unless ``--model.pattern.window=N`` says otherwise; any other key of
the model that needs no training can be set the same way. ``--cache=int8`` keeps keys and values in int8,
``--surgery=int8`` the weights.

Text goes to standard output, everything else to standard error; ``--json`` prints one object per answer instead.
"""

from __future__ import annotations

from experiments import cli
from experiments.commands.generate import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    cli.enter(main)
