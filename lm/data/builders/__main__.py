"""``python -m lm.data.builders NAME … [--data-dir=DIR]``: named texts as array_record files that ``tfds:`` reads."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.data.builders.datasets import ABOUT, builder_class
from lm.data.texts import tfds
from lm.errors import UserError, unknown


def prepare(name: str, data_dir: str | None) -> str:
    """Prepares one data set under `data_dir` (None: the library's default folder), unless it is there, and says how to
    read it. Raises `UserError` for an unknown name, a package that is missing and a folder that cannot be written."""
    if name not in ABOUT:
        raise unknown("builders", name, ABOUT)
    if not tfds.installed():
        raise UserError(f"builders: they need two packages that are not here; get them with: {tfds.HOW_TO_GET}")
    try:
        builder = builder_class(name)(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    except OSError as e:
        raise UserError(
            f"builders: --data-dir: {data_dir or 'the default folder'} cannot be written ({e.strerror or e})"
        ) from None
    # The folder of all data sets: the data set's own is NAME/VERSION below it.
    root = Path(str(builder.data_dir)).parent.parent
    examples = builder.info.splits["train"].num_examples
    return f"{name}: {examples} documents; read them with TFDS_DATA_DIR={root} and tfds:{builder.name}"


def main(argv: Sequence[str]) -> int:
    """0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lm.data.builders", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(ABOUT))
    parser.add_argument("--data-dir", default=os.environ.get("TFDS_DATA_DIR"), help="default: TFDS_DATA_DIR")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            print(prepare(name, args.data_dir))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
