"""How a command may end, and how many of many malformed ones do not end so.

``python tests/front/judged.py [--n=3000] [--seed=0] [--out=FILE.json]`` counts (with ``tests/front`` on the path).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import forks
import hostile
import sandbox

from lm.files import write_json

LONGEST = 1500  # characters of a message: a key, what was found, and a list of what is valid
SLOW = 60.0  # seconds until a command counts as endless


def wrong(command: str, ended: forks.Ended, changed: set[str]) -> str | None:
    """What is wrong with how a command ended; None where nothing is."""
    if ended.code is None:
        return "it does not end"
    if "Traceback" in ended.err + ended.out:
        return "a traceback"
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    if ended.code == 2:
        if not ended.err.startswith("error: ") or ended.err.count("\n") != 1:
            return "not one line"
        if len(ended.err) > LONGEST:
            return "a long line"
        if ended.out:
            return "output before the refusal"
        if changed:
            return f"written: {sorted(changed)[:3]}"
    if ended.code == 1 and not ended.err.startswith("error: ") and command not in ("compile", "results_page"):
        return "exit code 1 without an error"
    said = [line for line in ended.err.splitlines() if not line.startswith(("note: ", "as the checkpoint"))]
    if ended.code == 0 and said:
        return f"said beside the output: {said[0]}"
    return None


def counted(
    ask: forks.Server, folder: Path, cases: Iterator[tuple[str, hostile.Case]]
) -> tuple[int, list[str], list[str]]:
    """How many ended, what was wrong with some, and which passed though they must not."""
    n, bad, passed = 0, [], []
    sandbox.build(folder)
    first = sandbox.look(folder)
    for kind, case in cases:
        for name, text in case.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        before = sandbox.look(folder)
        ended = ask(case.command, case.argv, folder, SLOW, **case.more)
        after = sandbox.look(folder)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        n += 1
        if (why := wrong(case.command, ended, changed)) is not None:
            bad.append(f"{kind}: {why}: {case}: {ended.err[-300:]}")
        if case.refuse and ended.code != 2:
            passed.append(str(case))
        if after != first:
            sandbox.again(folder)
            first = sandbox.look(folder)
    return n, bad, passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, forks.Server() as ask:
        box = Path(place) / "box"
        n, bad, passed = counted(ask, box, hostile.cases(args.seed, args.n, box))
    print(f"{n} malformed: {len(bad)} ended badly, {len(passed)} passed that must not")
    print("\n".join([*bad, *passed][:10]))
    if args.out:
        write_json(args.out, {"inputs": n, "bad": len(bad), "passed": len(passed)})
    return 1 if bad or passed else 0


if __name__ == "__main__":
    sys.exit(main())
