"""A conversation with a checkpoint, in the terminal.

``python -m experiments.chat --checkpoint=smollm2-135m [--system='Be brief.'] [--pattern=lm_infinite]``

Every turn is read with all turns before it, as the checkpoint's chat template writes them; nothing is kept of what was
computed for earlier turns, so a long conversation begins its answers later. ``/reset`` forgets the conversation,
``/save FILE`` writes it as JSON, ``/quit`` and ctrl-d end. Where standard input is no terminal, each of its lines is a
turn of the user's; ``--json`` prints one object per answer. The model is read, and its tokens are drawn, as
`experiments.generate` does it, with the same switches.
"""

from __future__ import annotations

import sys

from experiments import cli
from experiments.commands.chat import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    sys.exit(main())  # ctrl-c ends an answer, not the conversation
