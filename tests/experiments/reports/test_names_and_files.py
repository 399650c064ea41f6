"""Names of others are plain text in Markdown; reports appear whole or not at all."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.reports import command, markdown, report
from experiments.reports.tables import Table
from lm.errors import UserError

NAMES = (
    "<img src=x onerror=alert(1)>",
    "[click](https://example.org)",
    "![](https://example.org/a.png)",
    "a|b||c",
    "*bold* **bolder** __under__ _slanted_",
    "`code` ``more``",
    "~~gone~~",
    "back\\slash \\| \\[x]",
    "&lt;b&gt; &#60;",
    "<https://example.org>",
    "two\nlines\r\nand | a bar",
    "lm_infinite x_1 > 0.5 < 3 1.3x ± 2",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_plain_text(name: str) -> None:
    parser = pytest.importorskip("markdown_it", reason="the oracle is a parser of Markdown").MarkdownIt("commonmark")
    parser.enable(["table", "strikethrough"])
    plain = " ".join(name.split())
    inline = parser.render("# " + markdown.escaped(name))
    assert html.unescape(inline.strip().removeprefix("<h1>").removesuffix("</h1>")) == plain
    made = parser.render(markdown.table(Table("t", ("a", name), ((name, "1"),))))
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", made, re.S)
    assert [html.unescape(cell) for cell in cells] == ["a", plain, plain, "1"]


def test_a_word_stays_as_it_is() -> None:
    assert markdown.escaped("lm_infinite: 2 < 3, 1.3x, 5 & 6") == "lm_infinite: 2 < 3, 1.3x, 5 & 6"


RESULTS: dict[str, Any] = {
    "schema": 1,
    "experiment": "toy",
    "arms": {"full": {"nll/nll": 1.0}},
    "curves": {"full": {"nll/nll": {"x": [0, 1], "y": [1.0, 2.0]}}},
}


@pytest.mark.parametrize("name", ["report.md", "report.html", "nll_nll.png"])
def test_reports_appear_whole_or_not_at_all(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {p.name for p in report.write(RESULTS, tmp_path)} == {"report.md", "report.html", "nll_nll.png"}
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="the report cannot be written"):
        report.write({**RESULTS, "experiment": "other"}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(before) and (tmp_path / name).read_bytes() == before[name]


def test_a_comparison_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm.files import write_json

    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        write_json(tmp_path / run / "results.json", RESULTS)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="the comparison cannot be written"):
        command.run([str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'out'}"])
    assert list((tmp_path / "out").iterdir()) == []


def test_results_that_were_edited_are_refused(tmp_path: Path) -> None:
    from lm.files import summed, write_json

    write_json(tmp_path / "results.json", summed(RESULTS))
    assert command.run([str(tmp_path)]) == 0
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(text.replace('"nll/nll": 1.0', '"nll/nll": 0.5'))
    with pytest.raises(UserError, match="was changed since it was written, by its sum"):
        command.run([str(tmp_path)])
