"""Conversations: which tokens are learned, with transformers as the oracle; rows that are told, and those refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from experiments.spec import registry
from lm.config import build, model_config
from lm.data import conversations, record
from lm.data.packing import Packed, split_row
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer, HFTokenizer
from lm.errors import UserError
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.model.params import init
from lm.train.config import TrainConfig
from lm.train.data import prepare
from lm.train.step import objective

PLAIN = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OUTSIDE = conversations.TEMPLATES["chatml"].replace(  # a template that marks answers without the end of their turn
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
)
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello é there"}, {"role": "assistant", "content": "the cat — 東京"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "the cat sat\n"},
        {"role": "user", "content": "two the mat"},
        {"role": "assistant", "content": " on the mat"},
        {"role": "user", "content": "three"},
    ],
    [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "the sun"},
    ],
]
TOOLS = [{"name": "weather", "parameters": {"place": {"type": "string"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows the marks of ChatML, as a Hugging Face folder with a template."""
    path = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=marks,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat there user assistant " * 20], trainer)
    inner.save(str(path / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    template = conversations.TEMPLATES["chatml"]
    (path / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": template}))
    return path


def text_of(folder: Path, template: str | None = None) -> TextRecord:
    found = record.by_name(str(folder), list, folder)
    return found if template is None else dataclasses.replace(found, templates={"default": template})


def write(path: Path, talks: list[Any], **more: Any) -> str:
    path.write_text("".join(json.dumps({"messages": talk, **more}) + "\n" for talk in talks))
    return str(path)


def learned(path: Path, text: TextRecord) -> list[tuple[list[int], list[bool]]]:
    made = conversations.Conversations(text).encode(conversations.documents(str(path)))
    return [(list(e.ids), list(e.answers or ())) for e in made]


def said(text: TextRecord, row: tuple[list[int], list[bool]]) -> str:
    """What is learned of a row, as text."""
    tokenizer = text.needs_tokenizer("test")
    return tokenizer.decode([i for i, ok in zip(*row, strict=True) if ok])


def test_the_mask_is_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    write(tmp_path / "a.jsonl", TALKS)
    for talk, (ids, answers) in zip(TALKS, learned(tmp_path / "a.jsonl", text_of(folder)), strict=True):
        want = theirs.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == want["input_ids"]
        assert [int(a) for a in answers] == want["assistant_masks"] and 0 < sum(answers) < len(ids)


@pytest.mark.parametrize("template", [PLAIN, OUTSIDE], ids=["prefixes", "end outside of the mark"])
def test_without_marks_and_with_the_end_outside_of_them_the_mask_is_the_same(
    folder: Path, tmp_path: Path, template: str
) -> None:
    write(tmp_path / "a.jsonl", TALKS)
    marked = learned(tmp_path / "a.jsonl", text_of(folder))
    assert learned(tmp_path / "a.jsonl", text_of(folder, template)) == marked
    assert said(text_of(folder), marked[1]) == "the cat sat\n<|im_end|> on the mat<|im_end|>"


@pytest.mark.parametrize("template", [PLAIN, "{# no {% generation %} here #}" + PLAIN], ids=["plain", "a remark"])
def test_the_assistant_may_speak_first(folder: Path, tmp_path: Path, template: str) -> None:
    """The head of its turn is no part of what it says. What a remark in a template says marks nothing."""
    talk = [("assistant", "the cat"), ("user", "there"), ("assistant", "the mat")]
    write(tmp_path / "a.jsonl", [[{"role": role, "content": text} for role, text in talk]])
    (row,) = learned(tmp_path / "a.jsonl", text_of(folder, template))
    assert [row] == learned(tmp_path / "a.jsonl", text_of(folder))
    assert said(text_of(folder), row) == "the cat<|im_end|>the mat<|im_end|>"


def test_tools_are_read_as_lists_and_as_json(folder: Path, tmp_path: Path) -> None:
    text = text_of(folder, PLAIN)
    write(tmp_path / "a.jsonl", TALKS[2:], tools=TOOLS)
    write(tmp_path / "b.jsonl", TALKS[2:], tools=json.dumps(TOOLS))
    (row,), other = learned(tmp_path / "a.jsonl", text), learned(tmp_path / "b.jsonl", text)
    assert [row] == other
    ids, _ = row
    assert '"weather"' in text.needs_tokenizer("test").decode(ids)
    assert said(text, row) == "call<|im_end|>the sun<|im_end|>"


def test_parquet_and_datasets_give_the_same_rows(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "a.jsonl", TALKS, tools=json.dumps(TOOLS))
    rows = datasets.Dataset.from_list([{"messages": talk, "tools": json.dumps(TOOLS), "n": 1} for talk in TALKS])
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    want = [json.loads(d.text) for d in conversations.documents(str(tmp_path / "a.jsonl"))]
    for spec in (str(tmp_path / "a.parquet"), f"hf:{tmp_path / 'saved'}"):
        assert [json.loads(d.text) for d in conversations.documents(spec)] == want


@pytest.mark.parametrize("kind", ["bytes", "without places"])
def test_tokenizers_without_places_find_the_same_answers(folder: Path, tmp_path: Path, kind: str) -> None:
    class Blind(HFTokenizer):
        encode_spans = ByteTokenizer.encode_spans  # the rule of the base class

    text = text_of(folder)
    assert isinstance(text.tokenizer, HFTokenizer)
    write(tmp_path / "a.jsonl", TALKS)
    if kind == "bytes":
        chatml = TextRecord.of(ByteTokenizer(), conversations.TEMPLATES["chatml"])
        row = learned(tmp_path / "a.jsonl", chatml)[0]
        assert said(chatml, row) == "the cat — 東京<|im_end|>"
    else:
        blind = dataclasses.replace(text, tokenizer=Blind(**vars(text.tokenizer)))
        assert learned(tmp_path / "a.jsonl", blind) == learned(tmp_path / "a.jsonl", text)


def settings(path: str, tokenizer: str, **data: Any) -> TrainConfig:
    given = {"texts": (path,), "kind": "chat", "tokenizer": tokenizer, "seq_len": 24, "held_out": 0.0, **data}
    return build(TrainConfig, {"data": given, "batch": 2, "steps": 2}, "train")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_only_answers_have_weight_in_rows(folder: Path, tmp_path: Path, packing: str) -> None:
    path = write(tmp_path / "a.jsonl", TALKS * 3)
    made = prepare(settings(path, str(folder), packing=packing, held_out=0.3), tmp_path / "cache")
    assert made.held_out is not None
    text, rows = text_of(folder), learned(tmp_path / "a.jsonl", text_of(folder))
    seen = []
    for part in (*made.train, made.held_out):
        for i in range(len(part)):
            row = split_row(part[i])
            seen += row["targets"][row["weights"] > 0].tolist()
            counted = row["weights"] > 0
            assert (row["segments"][counted] > 0).all()
    want = sorted(i for ids, answers in rows for i, ok in zip(ids, answers, strict=True) if ok)
    assert sorted(seen) == want and len(want) > 20
    assert text.end_of_turn() in want


def test_the_loss_is_that_of_the_answers_in_closed_form(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TALKS[:2])
    train = settings(path, str(folder), seq_len=64, packing="best_fit")
    (packed,) = prepare(train, tmp_path / "cache").train
    cfg = model_config({"vocab_size": 303, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24, "max_positions": 64})
    model = DecoderModel(cfg)
    params = jax.jit(lambda key: init(cfg, key))(jax.random.key(0))
    rows = [split_row(packed[i]) for i in range(len(packed))]
    batch = {k: jax.numpy.stack([row[k] for row in rows]) for k in rows[0]}
    loss, sums = jax.jit(lambda p, b: objective(cfg, train, p, b))(params, batch)
    read = jax.jit(lambda p, ids: model.apply(p, Inputs(ids)).logits_BTV)
    want, n = 0.0, 0
    for ids, answers in learned(tmp_path / "a.jsonl", text_of(folder)):  # each conversation by itself, unpacked
        logits = np.asarray(read(params, jax.numpy.asarray([ids]))[0], np.float64)
        for t in range(1, len(ids)):
            if answers[t]:
                want += math.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, ids[t]]
                n += 1
    assert float(sums["weight"]) == n > 5
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_rows_without_an_answer_and_long_ones_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [TALKS[0][:1], *TALKS, TALKS[0][:1]])
    made = prepare(settings(path, str(folder)), tmp_path / "cache")
    told = capsys.readouterr().err
    assert f"{path} line 1: the conversation has no answer of the assistant and is left out (and 1 more)" in told
    assert f"{path} line 2: the conversation is longer than train.data.seq_len = 24 tokens" in told
    assert len(made.train[0].corpus) == 3


def test_the_whole_conversation_may_be_learned(folder: Path, tmp_path: Path) -> None:
    """As `transformers` writes it; an answer is not asked for, nor a template that marks or keeps its turns."""
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path / "a.jsonl", [*TALKS, TALKS[0][:1], []])
    made = prepare(settings(path, str(folder), learn="all"), tmp_path / "cache").train[0].corpus
    assert made.answers is None and len(made) == len(TALKS) + 1
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    want = [theirs.apply_chat_template(talk, return_dict=False) for talk in (*TALKS, TALKS[0][:1])]
    assert made.tokens[:].tolist() == [i for ids in want for i in ids]
    other = prepare(settings(path, str(folder)), tmp_path / "cache").train[0].corpus
    assert other.identity != made.identity
    (tmp_path / "g.jinja").write_text(GROWS)
    prepare(settings(path, str(folder), learn="all", template=str(tmp_path / "g.jinja")), tmp_path / "cache")


def test_what_is_longer_than_a_row_is_split_cut_or_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    rows = learned(tmp_path / "a.jsonl", text_of(folder))
    lengths = [len(ids) for ids, _ in rows]
    size = lengths[2]  # the second is longer, the third as long as fits
    assert lengths[1] > size >= lengths[0]
    made = {}
    for overlong in ("split", "truncate", "drop"):
        train = settings(path, str(folder), packing="best_fit", seq_len=size - 1, overlong=overlong)
        data = prepare(train, tmp_path / "cache")
        made[overlong] = data.train[0]
        told = capsys.readouterr().err
        assert f"{path} line 2: the conversation is longer than train.data.seq_len = {size - 1} tokens" in told
        assert conversations._OVERLONG[overlong] in told and told.count("note:") == 1
        assert len({part.corpus.identity for part in made.values()}) == len(made)
    want = {"split": lengths, "truncate": np.minimum(lengths, size).tolist(), "drop": [lengths[0], lengths[2]]}
    for overlong, packed in made.items():
        assert np.diff(packed.corpus.offsets).tolist() == want[overlong]
        answers = [
            [bool(a) for a in packed.corpus.answers[a:b]]  # type: ignore[index]
            for a, b in zip(packed.corpus.offsets[:-1], packed.corpus.offsets[1:], strict=True)
        ]
        kept = rows if overlong != "drop" else [rows[0], rows[2]]
        assert answers == [[bool(x) for x in a][: len(b)] for (_, a), b in zip(kept, answers, strict=True)]
    assert made["truncate"].corpus.n_bytes[1] < made["split"].corpus.n_bytes[1]
    train = settings(path, str(folder), packing="best_fit", seq_len=10, overlong="truncate")
    with pytest.raises(UserError, match=r"none of 3 conversations has an answer .* within train\.data\.seq_len = 10"):
        prepare(train, tmp_path / "cache")
    train = settings(path, str(folder), packing="best_fit", seq_len=10, overlong="drop")
    with pytest.raises(UserError, match=r"train\.data\.seq_len: all conversations are longer than 10 tokens"):
        prepare(train, tmp_path / "cache")


GROWS = (  # thoughts of earlier turns are dropped once others follow
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else m['content'] | upper) + '\n' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("rows", "template", "words"),
    [
        (TALKS, GROWS, "line 1: the template of TEXT writes message 2 differently once others follow"),
        (TALKS, "{{ raise_exception('no tools here') }}", "line 1: the template of TEXT refuses the conversation: no"),
        ([TALKS[0][:1]], PLAIN, "none of 1 conversations has an answer"),
    ],
    ids=["prefixes that are none", "refused", "no answers"],
)
def test_what_cannot_be_learned_is_one_line(
    folder: Path, tmp_path: Path, rows: list[Any], template: str, words: str
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    text = text_of(folder, template)
    with pytest.raises(UserError) as e:
        conversations.tokenize(conversations.documents(path), text, "", 24, tmp_path / "cache")
    assert words.replace("TEXT", text.source) in str(e.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "x"}, "line 1: field 'messages' is missing; fields present: text"),
        ({"messages": "x"}, "line 1: field 'messages': valid: a list of objects"),
        ({"messages": [{"content": "x"}]}, "line 1: field 'messages': valid"),
        ({"messages": [], "tools": "{"}, "line 1: field 'tools': text that is no JSON"),
        ({"messages": [], "tools": 3}, "line 1: field 'tools': found int"),
    ],
    ids=["absent", "text", "no role", "tools torn", "tools number"],
)
def test_rows_that_are_no_conversations(tmp_path: Path, line: Any, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError) as e:
        conversations.documents(str(tmp_path / "a.jsonl"))
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "bytes"}, "train.data.template: the model has no chat template; valid: chatml"),
        ({"template": "chatmk"}, "unknown name 'chatmk' (did you mean 'chatml'?)"),
        ({"template": "no.jinja"}, "train.data.template: no.jinja: no such file"),
        ({"texts": ("kjv",)}, "train.data.texts: 'kjv' is text, not conversations"),
        ({"texts": ("nowhere.jsonl",)}, "train.data.texts: 'nowhere.jsonl' is no file with conversations"),
        ({"kind": "text", "template": "chatml"}, "train.data.template: 'chatml' is for train.data.kind = chat"),
        ({"kind": "chats"}, "train.data.kind"),
        ({"learn": "answer"}, "train.data.learn: unknown name 'answer' (did you mean 'answers'?)"),
        ({"overlong": "trunc"}, "train.data.overlong: unknown name 'trunc' (did you mean 'truncate'?)"),
        ({"kind": "text", "learn": "all"}, "train.data.learn: 'all' is for train.data.kind = chat, found text"),
        (
            {"overlong": "drop"},
            "train.data.overlong: 'drop' keeps conversations whole, but train.data.packing = concat",
        ),
    ],
    ids=[
        "no template",
        "unknown",
        "no file",
        "texts",
        "nowhere",
        "kind text",
        "kind unknown",
        "learn unknown",
        "overlong unknown",
        "learn of text",
        "overlong with concat",
    ],
)
def test_settings_that_cannot_be(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    with pytest.raises(UserError) as e:
        prepare(settings(path, **{"tokenizer": str(folder), **change}), tmp_path / "cache")
    assert words in str(e.value)


def test_a_run_without_the_keys_keeps_its_address() -> None:
    about = TrainConfig().determines()["data"]
    assert not {"kind", "template", "learn", "overlong"} & set(about)
    chat = build(TrainConfig, {"data": {"kind": "chat", "template": "chatml"}}, "train").determines()["data"]
    assert (chat["kind"], chat["template"]) == ("chat", "chatml")


def test_rows_of_a_corpus_with_answers_keep_them_through_a_damaged_copy(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    first = prepare(settings(path, str(folder)), tmp_path / "cache").train[0].corpus
    want = np.array(first.answers)  # `first` itself reads the file that is damaged now
    (about,) = (tmp_path / "cache" / "tokens").iterdir()
    for name in ("answers.npy", "about.json"):
        (about / name).write_bytes((about / name).read_bytes()[:-4])
        again = prepare(settings(path, str(folder)), tmp_path / "cache").train[0].corpus
        assert again.answers is not None
        np.testing.assert_array_equal(again.answers, want)
    assert isinstance(Packed(again, 24)[0]["answers"], np.ndarray)


def test_the_rows_of_the_example_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``configs/chat.py:smoke``, before its model: every conversation is in a row, four of them cut."""
    train = build(TrainConfig, registry.load(registry.CONFIGS / "chat.py").settings("smoke")["train"], "train")
    made = prepare(train, tmp_path)
    assert made.held_out is not None and len(made.train[0].corpus) + len(made.held_out.corpus) == 42
    assert (
        "the conversation is longer than train.data.seq_len = 128 tokens: what lies beyond is left out (and 3 more)"
        in (capsys.readouterr().err)
    )
    row = split_row(made.train[0][0])
    text = made.tokenizer.decode(row["targets"][row["weights"] > 0].tolist())
    assert text.endswith("<|im_end|>") and "user" not in text
