"""One record per source: whose special tokens, every stop token, templates, and all of it back on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from folders import BOS, EOS, around, byte_level, write

from lm.data.record import TextRecord, by_name, from_folder, from_gguf
from lm.data.tokenizers import ByteTokenizer, check_ids, check_vocab
from lm.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_whose_special_tokens(tmp_path: Path) -> None:
    """The tokenizer's own names stand before the ids of config.json; null is no token."""
    inner = byte_level("<|begin|>")
    config = {"bos_token_id": BOS, "eos_token_id": EOS}
    template = {"chat_template": "[{{ bos_token }}|{{ eos_token }}]"}
    made = from_folder(write(tmp_path / "own", inner, tokenizer_config={"bos_token": "<|begin|>", **template}), config)
    assert made.bos_id == 258 and made.render(HELLO).text == "[<|begin|>|</s>]"
    null = {"bos_token": None, "eos_token": {"content": "</s>", "lstrip": False}, **template}
    made = from_folder(write(tmp_path / "null", inner, tokenizer_config=null), config)
    assert made.bos_id is None and made.render(HELLO).text == "[|</s>]"
    made = from_folder(write(tmp_path / "config", inner, tokenizer_config=template), config)
    assert made.bos_id == BOS and made.render(HELLO).text == "[<s>|</s>]"
    older = write(tmp_path / "map", inner, tokenizer_config=template, special_tokens_map={"bos_token": "<|begin|>"})
    assert from_folder(older, config).words["bos_token"] == "<|begin|>"


@pytest.mark.parametrize(
    ("config", "generation", "template", "want"),
    [
        ({"eos_token_id": [EOS, 65]}, {}, None, {EOS, 65}),
        ({"eos_token_id": EOS}, {"eos_token_id": [65, EOS]}, None, {EOS, 65}),
        ({}, {"eos_token_id": 65}, None, {65}),
        ({"eos_token_id": EOS}, {}, CHATML, {EOS, 259}),
        ({"eos_token_id": [259]}, {}, CHATML, {259}),
        ({"eos_token_id": -1}, {}, None, {EOS}),  # an old way to say that there is none: the tokenizer's own
        ({}, {}, None, {EOS}),
        ({"eos_token_id": EOS}, {}, "{{ messages[-1].content }} over", {EOS}),  # text behind a turn is no mark
        ({"eos_token_id": EOS}, {}, "{{ raise_exception('no') }}", {EOS}),
    ],
)
def test_every_stop_token(config: Any, generation: Any, template: str | None, want: set[int], tmp_path: Path) -> None:
    inner = byte_level("<|im_start|>", "<|im_end|>")
    about = {"eos_token": "</s>", "chat_template": template}
    made = from_folder(write(tmp_path / "t", inner, tokenizer_config=about, generation_config=generation), config)
    assert set(made.stop_ids) == want


def test_a_gguf_file_names_three_ends() -> None:
    fields = {"eos_token_id": 2, "eot_token_id": 5, "eom_token_id": 6, "padding_token_id": 0, "bos_token_id": 1}
    fields |= {"model": "gpt2", "tokens": [*"abcdefg"], "merges": []}
    made = from_gguf(lambda key: fields.get(key.removeprefix("tokenizer.ggml.")), "m.gguf")
    assert made.stop_ids == (2, 5, 6) and made.pad_id == 0 and made.words["bos_token"] == "b"


def test_templates_by_name(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools|tojson }}"}]
    made = from_folder(write(tmp_path / "t", byte_level(), tokenizer_config={"chat_template": listed}), {})
    assert made.render(HELLO).text == "plain"
    assert made.render(HELLO, tools=[{"b": 1, "a": "<é>"}]).text == 'tools [{"b": 1, "a": "<é>"}]'
    assert made.render(HELLO, template="tool_use").text == "tools null"
    with pytest.raises(UserError, match=r"--template: .*'tool'.*did you mean 'tool_use'"):
        made.render(HELLO, template="tool")
    (tmp_path / "t" / "chat_template.jinja").write_text("from its own file")
    assert from_folder(tmp_path / "t", {}).render(HELLO).text == "from its own file"


def test_a_template_that_writes_the_first_token_gets_no_second(tmp_path: Path) -> None:
    inner = byte_level()
    inner.post_processor = around("<s> $A", **{"<s>": BOS})
    about = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    made = from_folder(write(tmp_path / "t", inner, tokenizer_config=about), {})
    assert made.chat(HELLO, 258, "--prompt") == [BOS, *b"Hello"] == made.encode("Hello", 258, "--prompt")


def test_what_leaves_is_what_came_in(tmp_path: Path) -> None:
    inner = byte_level("<|im_start|>", "<|im_end|>", "<|pad|>")
    inner.post_processor = around("<s> $A", **{"<s>": BOS})
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 4096,
        "add_bos_token": True,
        "padding_side": "left",
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "t"}],
    }
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [EOS, 259], "pad_token_id": 260}
    config = {"eos_token_id": EOS, "bos_token_id": BOS}
    first = from_folder(write(tmp_path / "in", inner, tokenizer_config=about, generation_config=generation), config)
    (tmp_path / "out").mkdir()
    first.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {k: written[k] for k in about} == about
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {**generation, "bos_token_id": BOS}
    assert first.config == {"bos_token_id": BOS, "eos_token_id": [EOS, 259], "pad_token_id": 260}
    second = from_folder(tmp_path / "out", first.config)
    for name in ("words", "bos_id", "eos_ids", "pad_id", "templates", "stop_ids"):
        assert getattr(second, name) == getattr(first, name), name
    assert second.tokenizer is not None and first.tokenizer is not None
    assert (
        second.tokenizer.encode_text("ab<|im_end|>")
        == first.tokenizer.encode_text("ab<|im_end|>")
        == [BOS, 97, 98, 259]
    )


def test_text_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A word's marker at the beginning of an answer is a space; a character may be cut between prompt and answer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    text = "the cat sat on the mat and the dog sat on the log"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, vocab_size=18, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    made = from_folder(tmp_path, {"bos_token_id": 1, "eos_token_id": 2}).tokenizer
    assert made is not None
    ids = made.encode_text("the cat sat on the log")
    for cut in range(1, len(ids)):
        head = made.decode(ids[:cut])
        assert head + made.continued(ids[:cut], ids[cut:]) == made.decode(ids)
    word = next(i for i in range(2, len(ids)) if made.token(ids[i]).startswith("\u2581"))
    assert made.continued(ids[:word], ids[word:]).startswith(" ")
    letters = ByteTokenizer()
    ids = letters.encode("aé東")
    for cut in range(1, len(ids)):
        assert letters.decode(ids[:cut]).rstrip("\ufffd") + letters.continued(ids[:cut], ids[cut:]) == "aé東"


def test_added_tokens_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=model, vocab_size=9, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    decoder = {"9": {"content": "<|im_end|>", "special": True}}
    about = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    write(tmp_path, tokenizer_config=about)
    made = from_folder(tmp_path, {}).tokenizer
    assert made is not None and made.eos_id == 9 and made.vocab_size == 10 and made.base_size == 9
    assert made.encode_text("a<|im_end|>") == [1, *made.encode("a"), 9] and made.encode("<s>") == [1]
    assert made.decode(made.encode("a<|im_end|>")) == "a<|im_end|>"


def test_a_token_without_a_row_is_refused_when_it_is_used(tmp_path: Path) -> None:
    made = from_folder(write(tmp_path / "t", byte_level("<|late|>")), {})
    assert made.tokenizer is not None

    class Model:
        vocab_size = 258

    check_vocab(made.tokenizer, Model())
    assert made.encode("ab", 258, "--prompt") == [97, 98]
    with pytest.raises(UserError, match=r"--prompt: the text has the token '<\|late\|>', id 258, .* 258 rows"):
        made.encode("a<|late|>", 258, "--prompt")
    assert check_ids(made.tokenizer, [258], 259, "x") == [258]
    Model.vocab_size = 100
    with pytest.raises(UserError, match="foreign vocabulary"):
        check_vocab(made.tokenizer, Model())


def test_the_end_of_a_document_is_the_checkpoints_own(tmp_path: Path) -> None:
    inner = byte_level("<|fin|>")
    write(tmp_path / "own", inner, tokenizer_config={"eos_token": "<|fin|>"})
    made = by_name(str(tmp_path / "own"), lambda: [], tmp_path)
    assert made.tokenizer is not None and made.tokenizer.encode_document("a") == [97, 258]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": [1]}, "tokenizer_config.json: expected an object, found list"),
        ({"tokenizer_config": {"bos_token": 3}}, "tokenizer_config.json bos_token: expected a string, found 3"),
        ({"generation_config": {"eos_token_id": "x"}}, "generation_config.json eos_token_id: expected an integer"),
        (
            {"generation_config": {"eos_token_id": [1, True]}},
            "generation_config.json eos_token_id: expected an integer",
        ),
    ],
)
def test_damaged_files_are_named(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        from_folder(write(tmp_path / "t", byte_level(), **files), {})
    assert words in str(caught.value)


def test_a_tokenizer_of_ours_says_little() -> None:
    made = TextRecord.of(ByteTokenizer())
    assert made.stop_ids == (257,) and made.words == {"bos_token": "<s>", "eos_token": "</s>"} and not made.templates
    with pytest.raises(UserError, match="has no chat template"):
        made.render(HELLO)
    with pytest.raises(UserError, match="--prompt: the model has no tokenizer"):
        TextRecord().encode("a", 258, "--prompt")
