"""``python -m lm.data.texts`` prints the named sources, ``python -m lm.data.texts SPEC`` the documents of a spec."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.data.texts import hf_datasets, series, stream, tfds
from lm.data.texts.document import Identity
from lm.data.texts.sources import SOURCES
from lm.errors import UserError

_LIBRARIES = {"tfds": tfds, "hf": hf_datasets, "series": series}  # sources of any number of datasets


def _table() -> list[list[str]]:
    rows = [["source", "installed", "documents", "characters", "licence", "what, for example, how to get it"]]
    for source in SOURCES.values():
        about = f"{source.description}; {source.members}; {source.how_to_get}"
        installed, count, size = "yes", "-", "-"
        try:
            if source.name in _LIBRARIES:
                installed = "yes" if _LIBRARIES[source.name].installed() else "no"
            else:
                sizes = [len(d.text) for d in source.loader(None)]
                count, size = f"{len(sizes)}", f"{sum(sizes):,}"
        except UserError:
            installed = "no"
        rows.append([source.name, installed, count, size, source.licence, about])
    return rows


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(argv: Sequence[str]) -> int:
    """Prints the named sources, or with a spec its documents and their identity."""
    try:
        if not argv:
            _print(_table())
            return 0
        made, rows = Identity(), [["document", "characters", "licence"]]
        for d in (d for spec in argv for d in stream(spec)):
            made.add(d)
            rows.append([d.name, f"{len(d.text):,}", d.licence])
        _print(rows)
        print(f"{made.count} documents, identity {made.hexdigest()}")
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the pipe has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
