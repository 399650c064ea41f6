"""What `experiments.report` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.reports import html, markdown, report, results_file
from experiments.sweeps import report as report_of_sweep
from lm.errors import UserError
from lm.files import user_path, write_text

PROG = "python -m experiments.report"


def run(argv: Sequence[str], doc: str | None = None) -> int:
    """Reports one run or sweep, or compares several runs; raises `UserError` for a folder without valid results."""
    parser = cli.Parser(PROG, doc)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, its results.json, or a sweep's folder")
    parser.add_argument("--out", type=Path, help="folder to write into (default: the folder of the run)")
    args, unknown = parser.parse_known_args(argv)
    parser.refuse(unknown)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; valid: a folder, which is made when absent")
    folders = [user_path(run, "RUN") for run in args.runs]
    if len(folders) == 1 and folders[0].is_dir() and (folders[0] / "sweep.json").is_file():
        for path in report_of_sweep.write(folders[0], args.out or folders[0]):
            print(path)
        return 0
    loaded = [results_file.load(folder) for folder in folders]
    if len(loaded) == 1:
        for path in report.write(loaded[0][0], args.out or loaded[0][1]):
            print(path)
        return 0
    names = _names([folder for _, folder in loaded])
    found = report.compare(dict(zip(names, (results for results, _ in loaded), strict=True)))
    text = markdown.comparison(names, found)
    print(text, end="")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(args.out / "comparison.md", text)
            write_text(args.out / "comparison.html", html.comparison_page(names, found))
        except OSError as e:
            raise UserError(f"{args.out}: the comparison cannot be written ({e.strerror or e})") from None
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    absolute = [f.resolve().parts for f in folders]
    for depth in range(1, max(len(p) for p in absolute) + 1):
        names = ["/".join(p[-depth:]) for p in absolute]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report: {folders[0]} is given twice; valid: different run folders")
