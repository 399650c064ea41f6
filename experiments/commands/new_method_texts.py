"""What `experiments.new_method` writes."""

from __future__ import annotations

PLUG = '''"""{cls} (arXiv {arxiv}, section or equation): one sentence on what it computes."""

from __future__ import annotations

from dataclasses import dataclass

{imports}


@dataclass(frozen=True)
class {cls}({base}):
    """Settings are fields under the paper's names, with units; `lm.plug.bounded` gives those that have a least value.

    Say here which of paper and authors' code is followed where they differ.
    """

{methods}
'''

TRAIN = """    c.train = small.train("smoke")
"""

CONFIG = '''"""{cls} (arXiv {arxiv}): the hypothesis in one sentence.

Expected before the run: the number, its unit, and what differs from the paper. Cost on 2 CPU cores: ``:smoke`` seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.bases import small
from experiments.claims import Claim, Results, claim

SCALES = ("smoke",)


def get_config(scale: str = "smoke") -> ConfigDict:
    c = ConfigDict()
    c.name = "{name}"
    c.scale = scale
    c.paper = {{"title": "", "arxiv": "{arxiv}", "claim": "", "numbers": {{}}}}
    c.checkpoint = "random"
    c.baseline = "baseline"
    c.seeds = (0,)
    c.model = small.model("smoke")
{train}    c.measures = {{"{label}": {measure}}}
    c.arms = ConfigDict({{"baseline": {{}}, "{name}": {arm}}}, allow_dotted_keys=True)
    return c


def claims(r: Results) -> list[Claim]:
    def holds() -> tuple[bool, dict[str, float]]:
        raise NotImplementedError("{place}: write the claim as a predicate over measured numbers, like {metric}")

    return [claim("{name}: the paper's claim", holds, paper=None)]
'''

TEST = {
    "head": '''"""{cls} (arXiv {arxiv}): the generic suite of its socket, an independent oracle, and its experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
{case_import}
from experiments import run
from experiments.spec import registry
{plug_import}
''',
    "suite": """
class Test{cls}({case}):
{declares}

    def test_it_is_declared(self) -> None:
        pytest.fail("{place}: say what {case} asks for, and delete this test")

""",
    "oracle": """
def test_the_oracle() -> None:
    pytest.fail("{place}: compare with NumPy written from the equations")


def test_the_experiment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    config = registry.CONFIGS / "{name}.py"
    assert run.main([f"--config={{config}}:smoke", f"--workdir={{tmp_path / 'run'}}"]) == 0
""",
}
