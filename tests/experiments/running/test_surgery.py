"""Surgery in arms: done to given parameters before they are measured, refused by name where it is not possible."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy_experiment import Lab

from experiments.running.job import make
from experiments.running.plan import prepare
from experiments.spec import registry, settings
from experiments.spec.surgery import surgeries
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.plug import table
from lm.surgery.base import Surgery
from lm.surgery.calibration import Calibration, CalibrationText
from lm.surgery.int8 import Int8

NLL = '"toy": {"name": "nll_by_position", "texts": ("python-docs",), "tokens": 32, "bin": 8}} or {"toy": {'


@pytest.fixture
def reading(lab: Lab) -> Lab:
    """The toy experiment with a measure that reads, and arms whose parameters are operated on."""
    arms = '"int8": {"surgery": ("int8",)},\n        '
    arms += '"kept": {"surgery": ({"name": "int8", "keep": ("*",)},)},\n        '
    text = lab.config.read_text().replace('"toy": {', NLL, 1).replace(', "measures.toy.value": 2.0', "")
    text = text.replace('"also": {', arms + '"also": {').replace("c.seeds = (0, 1)", "c.seeds = (0,)")
    lab.config.write_text(text)
    return lab


def test_an_arm_with_surgery_reads_other_parameters(reading: Lab) -> None:
    assert reading("--arms=zero,int8,kept") == 0
    made = reading.results()
    nll = {arm: values["toy/nll_inside"]["mean"] for arm, values in made["arms"].items()}
    assert nll["int8"] != nll["zero"] and nll["int8"] == pytest.approx(nll["zero"], rel=1e-3)
    assert nll["kept"] == nll["zero"]  # nothing is rounded: the baseline, bit for bit
    what = [json.loads(p.read_text())["what"].get("surgery") for p in (reading.folder / "points").iterdir()]
    assert sorted(str(w) for w in what) == sorted(
        ["None", "[{'name': 'int8', 'keep': []}]", "[{'name': 'int8', 'keep': ['*']}]"]
    )
    resolved = json.loads((reading.folder / "config.json").read_text())["resolved"]
    assert resolved["int8"]["surgery"] == [{"name": "int8", "keep": []}] and "surgery" not in resolved["zero"]


def test_a_run_with_surgery_is_repeated_from_its_folder(reading: Lab) -> None:
    assert reading("--arms=int8") == 0
    again = reading.root / "again"
    assert reading("--arms=int8", config=str(reading.folder / "config.json"), workdir=again) == 0
    assert reading.results(again)["arms"] == reading.results()["arms"]


def test_surgery_from_the_command_line(lab: Lab) -> None:
    raw = registry.load(lab.config).settings("laptop")

    def of(value: str) -> list[dict[str, object]]:
        plan = prepare(raw, [("arms.also.surgery", settings.Text(value))], None)
        job = next(j for j in make(plan) if j.arm == "also")
        return job.what("", defaultdict(str), "cpu")["surgery"]

    assert of("int8") == of("('int8',)") == [{"name": "int8", "keep": []}]
    assert of("('int8', {'name': 'int8', 'keep': 'embed'})") == [
        {"name": "int8", "keep": []},
        {"name": "int8", "keep": ["embed"]},
    ]


MISTAKES = {
    "misspelt": ("('itn8',)", "surgery[0].name: unknown name 'itn8' (did you mean 'int8'?); valid: int8"),
    "trained": ("('int8', 'lora')", "surgery[1].name: 'lora' is trained, which goes with train.surgery; valid: int8"),
    "no name": ("({'keep': ('embed',)},)", "surgery[0].name: missing"),
    "no such field": ("({'name': 'int8', 'kept': ()},)", "surgery[0].kept: unknown key (did you mean 'keep'?)"),
    "a number": ("3", "surgery: expected a tuple of names or mappings, found 3; valid: int8"),
    "empty": ("()", "surgery: expected a tuple"),
}


@pytest.mark.parametrize(("value", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_in_surgery(lab: Lab, capsys: pytest.CaptureFixture[str], value: str, said: str) -> None:
    assert lab(f"--config.arms.also.surgery={value}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: arms.also: " + said) and err.count("\n") == 1
    assert not lab.folder.exists()


def test_plugs_of_surgery() -> None:
    assert surgeries("int8") == surgeries(["int8"]) == (Int8(),)
    assert surgeries(({"name": "int8", "keep": ("embed",)}, "int8")) == (Int8(("embed",)), Int8())
    with pytest.raises(UserError, match="'none' is trained"):
        surgeries(("none",))


@dataclass(frozen=True)
class Centred(Surgery):
    """A toy that looks at a text: the table of tokens times the largest number that any layer gives on it."""

    calibration: CalibrationText = field(default_factory=lambda: CalibrationText(rows=2, length=8))

    @property
    def reads(self) -> CalibrationText:
        return self.calibration

    def apply(self, cfg: Any, params: Any, data: Calibration | None = None) -> tuple[Any, Any]:
        assert data is not None and data.tokens_BT.shape == (self.calibration.rows, self.calibration.length)
        size = max(float(abs(view.output()).max()) for view in data.layers(cfg, params))
        return cfg, {**params, "embed": params["embed"] * size}


def test_surgery_looks_at_a_text(reading: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the plug's own texts reach it; settings and texts are part of what a point is addressed by."""
    monkeypatch.setitem(table("lm.surgery"), "centred", Centred)
    arm = "--config.arms.int8.surgery=({'name': 'centred', 'calibration': {'texts': 'python-docs', 'rows': %d}},)"
    assert reading("--arms=zero,int8", arm % 2) == 0
    nll = {name: values["toy/nll_inside"]["mean"] for name, values in reading.results()["arms"].items()}
    assert abs(nll["int8"] - nll["zero"]) > 1e-4
    what = [json.loads(p.read_text())["what"].get("surgery") for p in (reading.folder / "points").iterdir()]
    (said,) = [w[0] for w in what if w]
    assert said["calibration"]["rows"] == 2 and len(said["texts"]) == 64
    assert reading("--arms=int8", "--config.arms.int8.surgery=({'name': 'centred', 'calibration': {'rows': 0}},)") == 2


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    few = CalibrationText((str(tmp_path / "a.txt"),), rows=3, length=4)
    with pytest.raises(UserError, match=r"surgery\.calibration\.rows: 3 of 4 tokens asked for, .* has 2"):
        few.read(ByteTokenizer())
    assert CalibrationText((str(tmp_path / "a.txt"),), rows=2, length=4).read(ByteTokenizer()).tokens_BT.tolist() == [
        list(b"abcd"),
        list(b"efgh"),
    ]
    with pytest.raises(UserError, match="has no tokenizer"):
        few.read(None)
