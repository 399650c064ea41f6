"""Conversations as transformers renders them, byte for byte; what a template may not do."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

import lm.data.chat as chat
from lm.data.chat import choose, render
from lm.errors import UserError

# Small templates in the manner of ten families: what each of them uses of the language.
FAMILIES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "families").glob("*.jinja"))}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hello <b>\"world\"</b> & 'all' é 東京 "}],
    "three": [
        {"role": "user", "content": "What?\n"},
        {"role": "assistant", "content": "<think>hm</think>That.", "reasoning_content": "\nhm\n"},
        {"role": "user", "content": "Why?"},
    ],
    "system": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"z": 1, "a": ["<é>"]}}]},
    ],
}
TOOLS = [{"name": "weather", "parameters": {"place": {"type": "string"}, "<day>": {"type": "integer"}}}]
DOCUMENTS = [{"title": "T", "text": "é"}, {"title": "U", "text": "<>"}]
WORDS = {"bos_token": "<s>", "eos_token": "</s>"}


def ours(template: str, talk: list[dict[str, Any]], **more: Any) -> str:
    try:
        return render(template, talk, "m", **WORDS, **more).text
    except UserError:
        return "refused"


def theirs(template: str, talk: list[dict[str, Any]], **more: Any) -> str:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template

    try:
        made = render_jinja_template([_normalize_chat_messages(talk)], chat_template=template, **WORDS, **more)
    except (TemplateError, TypeError):
        return "refused"
    return str(made[0][0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("talk", TALKS)
def test_byte_for_byte_as_transformers(family: str, talk: str) -> None:
    pytest.importorskip("transformers")
    for more in ({}, {"add_generation_prompt": True}, {"tools": TOOLS, "documents": DOCUMENTS}):
        given = {"add_generation_prompt": False, "tools": None, "documents": None, **more}
        assert ours(FAMILIES[family], TALKS[talk], **given) == theirs(FAMILIES[family], TALKS[talk], **given)


def test_the_ten_say_something() -> None:
    """There are ten, and not all of them are refused: each renders at least two of the conversations."""
    for name, template in FAMILIES.items():
        made = {ours(template, talk) for talk in TALKS.values()} - {"refused"}
        assert len(made) >= 2, name
    assert len(FAMILIES) == 10


def test_the_models_own_words_are_marked() -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }};"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    talk = [*TALKS["three"], {"role": "assistant", "content": "Because é."}]
    made = render(template, talk, "m", add_generation_prompt=False)
    assert [made.text[a:b] for a, b in made.answers] == ["<think>hm</think>That.;", "Because é.;"]
    _, want = render_jinja_template([talk], chat_template=template, return_assistant_tokens_mask=True)
    assert list(made.answers) == want[0]


def test_the_date_is_todays() -> None:
    made = render("{{ strftime_now('%d %B %Y') }}", TALKS["one"], "m").text
    days = (datetime.datetime.now() - datetime.timedelta(days=d) for d in (0, 1))  # midnight may pass
    assert made in {d.strftime("%d %B %Y") for d in days}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% for m in messages %}", "cannot be rendered (line 1:"),
        ("{{ messages[0].nothing.more }}", "cannot be rendered (UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered (SecurityError"),
        ("{{ messages.append(1) }}", "cannot be rendered (SecurityError"),
        ("{% set n = namespace(_x=1) %}", "cannot be rendered (SecurityError"),
        ("{{ 1 / 0 }}", "cannot be rendered (ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered (it calls itself without end"),
        ("{{ 'x' * 10**11 }}", "needs more memory than is allowed"),
        ("{{ '%9999999d' | format(1) }}{{ '%9999999d' | format(1) }}", "more than 10,485,760 characters"),
    ],
)
def test_an_error_is_one_line(template: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        render(template, TALKS["one"], "the folder")
    assert words in str(caught.value) and "the folder" in str(caught.value) and "\n" not in str(caught.value)
    assert render("fine", TALKS["one"], "m").text == "fine"


def test_a_template_has_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"it takes longer than 0\.5 s"):
        render(endless, TALKS["one"], "m")
    monkeypatch.undo()
    assert render("fine", TALKS["one"], "m").text == "fine"


def test_what_cannot_be_said_in_json() -> None:
    with pytest.raises(UserError, match="not made of text"):
        render("x", [{"role": "user", "content": object()}], "m")


def test_which_template() -> None:
    one, two = {"default": "d"}, {"default": "d", "tool_use": "t"}
    assert (
        choose(one, None, True, "m") == "d"
        and choose(two, None, True, "m") == "t"
        and choose(two, None, False, "m") == "d"
    )
    assert choose({"rag": "r"}, None, False, "m") == "r" and choose(two, "tool_use", False, "m") == "t"
    with pytest.raises(UserError, match="m has no chat template"):
        choose({}, None, False, "m")
