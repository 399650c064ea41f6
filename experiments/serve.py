"""An HTTP server for one checkpoint, in the protocol of OpenAI's API.

``python -m experiments.serve --checkpoint=smollm2-135m [--host=127.0.0.1] [--port=8000] [--pattern=NAME] [--cache=int8]
[--surgery=int8] [--max-batch=8] [--max-wait-ms=10] [--model-name=NAME]``

``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``, whole or streamed. The model is read as
`experiments.generate` reads it, with the same switches and ``--model.KEY=VALUE``. Requests that arrive within
``--max-wait-ms``, and those that come while a batch runs, are answered together, each with its own settings. A field
that is not obeyed is refused by name. What a request does not say about drawing, the checkpoint's generation settings
do, else the API's defaults. Needs the extra ``serve``.
"""

from __future__ import annotations

import sys

from experiments import cli
from experiments.serving.command import run

main = cli.command(run, __doc__)

if __name__ == "__main__":
    sys.exit(main())  # signals are the server's: it lets answers end
