"""The harness adapter against the harness's own Hugging Face model, on the same weights and tasks from data at hand."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from cases.table_model import TableLM, TableModel, V

from experiments import evaluate
from lm import interop
from lm.config import merge, model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer, Tokenizer
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib

lm_eval = pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
MODEL = {
    "vocab_size": 260,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_positions": 96,
    "norm": {"name": "rmsnorm", "eps": 1e-5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = model_config(MODEL)
    weights = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params_lib.init(cfg, jax.random.key(0)))
    path = tmp_path_factory.mktemp("model") / "hf"
    to_huggingface.write(path, cfg, weights, TextRecord.of(ByteTokenizer(None, 257), "{{ messages[-1].content }}"))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over Python's documentation: which word comes next, the whole text, and going on from a prompt."""
    root = tmp_path_factory.mktemp("tasks")
    texts = [topics[k] for k in sorted(topics)[:6]]
    rows = []
    for text in texts:
        words = text.split()[:14]
        rows.append({"context": " ".join(words[:10]), "choices": [words[10], "banana", words[12]], "label": 0})
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t[:400]}) + "\n" for t in texts))
    common = "dataset_path: json\ntest_split: test\nmetadata:\n  version: 1.0\n"

    def data(file: str) -> str:
        return f"dataset_kwargs:\n  data_files:\n    test: {root}/{file}\n"

    (root / "next_word.yaml").write_text(
        f"task: next_word\n{common}{data('rows.jsonl')}output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (root / "whole_text.yaml").write_text(
        f"task: whole_text\n{common}{data('texts.jsonl')}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n"
    )
    (root / "goes_on.yaml").write_text(
        f"task: goes_on\n{common}{data('rows.jsonl')}output_type: generate_until\n"
        'doc_to_text: "{{context}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return root


TASKS = ("next_word", "whole_text", "goes_on")


def answers(model: Any, tasks: Path, names: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """Every task's responses, request by request."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)  # thousands of files
    made = lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    return {task: [s["resps"] for s in samples] for task, samples in made["samples"].items()}


BEGINS = {  # the post-processor's template, and what tokenizer_config.json says beside it
    "neither": (None, {}),
    "a beginning": ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}),
    "a beginning and an end": ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "a beginning that is only named": (None, {"bos_token": "<s>", "eos_token": "</s>"}),
    "an end that is only named": ("<s> $A", {"eos_token": "</s>"}),
}


DAILY = ("a beginning and an end",)


@pytest.mark.parametrize(
    "name", [*DAILY, *(pytest.param(name, marks=pytest.mark.nightly) for name in BEGINS if name not in DAILY)]
)
def test_it_answers_as_the_harnesss_own_model(
    name: str, folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tokenizer puts around a text: continuations, whole texts in several windows, and greedy answers."""
    pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    from lm.interop.harness import DecoderLM

    single, named = BEGINS[name]
    folder = Path(shutil.copytree(folder, tmp_path / "hf"))
    if single or named:
        inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.add_special_tokens(["<s>", "</s>"])
        if single:
            around = tokenizers.processors.TemplateProcessing(
                single=single, special_tokens=[("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))]
            )
            inner.post_processor = around
        inner.save(str(folder / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    theirs = answers(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4), tasks)
    ours = answers(DecoderLM(interop.load(str(folder)), batch_size=4), tasks)
    for task in ("next_word", "whole_text"):
        for a, b in zip(ours[task], theirs[task], strict=True):
            for (x,), (y,) in zip(a, b, strict=True):
                x, y = (x, y) if isinstance(x, tuple) else ((x, True), (y, True))
                assert x[0] == pytest.approx(y[0], rel=1e-4, abs=1e-3) and x[1] == y[1]
    assert ours["goes_on"] == theirs["goes_on"]


class Digits(Tokenizer):
    """The digits 0 to 7 are their own ids; 7 ends a text."""

    bos_id, eos_id, vocab_size, identity = None, 7, V, "digits"  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(str(i) for i in ids)

    def save(self, folder: Path) -> dict[str, object]:
        raise NotImplementedError


def test_any_language_model_answers() -> None:
    """A table of eight tokens, which is no decoder: log-probabilities in closed form, and its greedy text."""
    from lm_eval.api.instance import Instance

    from lm.interop.harness import DecoderLM

    table = TableModel.random(0, 1.2)
    read = interop.Checkpoint(model_config(MODEL), table.params, TextRecord.of(Digits()), "table", "a table")
    model = DecoderLM(read, TableLM(), max_length=8, batch_size=2)

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    def score(text: str) -> float:
        return sum(float(np.log(table.p_VV[int(a), int(b)])) for a, b in itertools.pairwise(text))

    texts = [("12", "345"), ("", "6"), ("3", str(table.likeliest(3, 1)[0]))]
    scored = model.loglikelihood(asked("loglikelihood", *texts))
    want = [score("2345"), score("76"), score("3" + texts[2][1])]
    np.testing.assert_allclose([s for s, _ in scored], want, rtol=1e-5)
    assert scored[2][1] and not scored[0][1]
    (rolling,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", ("0123456543210",)))
    np.testing.assert_allclose(rolling, score("70123456543210"), rtol=1e-5)
    (text,) = model.generate_until(asked("generate_until", ("1", {"until": [], "max_gen_toks": 3})))
    assert text == "".join(map(str, table.likeliest(1, 3))).split("7")[0]


def test_patterns_change_what_is_read(folder: Path, tasks: Path) -> None:
    from lm.interop.harness import DecoderLM

    loaded = interop.load(str(folder))

    def read(*model: Any, **change: Any) -> Any:
        return answers(DecoderLM(*model, **change), tasks, ("whole_text",))["whole_text"]

    full = read(loaded)
    narrow = merge(loaded.config, {"pattern": {"name": "sliding_window", "window": 4}}, "model")
    assert read(loaded, narrow) != full
    wide = merge(loaded.config, {"pattern": {"name": "lm_infinite", "window": 96, "ceiling": 96.0}}, "model")
    assert read(loaded, wide, max_length=512) != full  # whole texts in one window, past the trained length


def test_the_command_prints_the_harnesss_table(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        f"--checkpoint={folder}",
        "--tasks=next_word,whole_text",
        f"--include={tasks}",
        f"--out={tmp_path}/out.json",
    ]
    assert evaluate.main([*args, "--pattern=lm_infinite", "--max-length=256"]) == 0
    assert "|next_word" in capsys.readouterr().out
    made = json.loads((tmp_path / "out.json").read_text())
    assert (
        set(made["results"]) == {"next_word", "whole_text"} and made["results"]["whole_text"]["bits_per_byte,none"] > 0
    )
    assert evaluate.main(args) == 2
    assert "out.json exists already" in capsys.readouterr().err


def test_eight_devices_score_as_one(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for name, args in (("one", []), ("eight", ["--mesh=tensor=2,fsdp=4"])):
        common = [f"--checkpoint={folder}", f"--include={tasks}", "--limit=2", f"--out={tmp_path}/{name}.json"]
        assert evaluate.main([*common, "--tasks=next_word,whole_text,goes_on", *args]) == 0
        made.append(json.loads((tmp_path / f"{name}.json").read_text())["results"])
    one, eight = made
    assert eight["goes_on"] == one["goes_on"]
    for task, metric in (("next_word", "acc,none"), ("whole_text", "bits_per_byte,none")):
        assert eight[task][metric] == pytest.approx(one[task][metric], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tasks=next_wrd"], "--tasks: unknown name 'next_wrd' (did you mean 'next_word'?)"),
        (["--tasks=next_word", "--limit=0"], "--limit: must be at least 1"),
        (["--tasks=next_word", "--pattern=lm_inf"], "--pattern: unknown name 'lm_inf'"),
        ([], "--tasks"),
    ],
)
def test_mistakes(folder: Path, tasks: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--checkpoint={folder}", f"--include={tasks}", *args]) == 2
    assert words in capsys.readouterr().err
