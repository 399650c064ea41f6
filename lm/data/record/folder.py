"""The record of a Hugging Face folder: five files that say parts of it, read once and in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm import files
from lm.data.record.record import TextRecord
from lm.data.tokenizers import HFTokenizer, SentencePieceTokenizer, Tokenizer, from_directory
from lm.data.tokenizers.sentencepiece import FLAGS
from lm.errors import UserError, shown

# What it is read from, beside config.json; patterns.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")  # what a checkpoint may say of it
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What is no setting of a tokenizer: written anew, or a path on the machine of whoever saved it.
ASIDE = ("chat_template", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file", "auto_map", *NAMED)


def from_folder(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> TextRecord:
    """What `folder` says, `config` being its config.json (empty where the folder holds a tokenizer alone).

    `tokenizer` stands in for the one of the folder's files. Raises `UserError` naming the file that is damaged.
    """
    settings = read_object(folder / "tokenizer_config.json")
    generation = read_object(folder / "generation_config.json")
    _check_drawn(folder / "generation_config.json", generation)
    said = _named(folder, settings)
    tokenizer = from_directory(folder) if tokenizer is None else tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):  # its file names some itself
        said = {**tokenizer.named(), **said}
    if tokenizer is not None:
        tokenizer = _with_added(tokenizer, folder, settings, said)
    ids = {name: _ids(folder, name, config, generation) for name in IDS}
    words = {name: token for name, token in said.items() if token is not None}
    found: dict[str, int | None] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        own = tokenizer.find(words[name]) if tokenizer is not None and name in words else None
        listed = ids[f"{name}_id"]
        if own is None and name not in said and listed:  # nobody but config.json names it
            own = listed[0]
            if tokenizer is not None and own < tokenizer.vocab_size:
                words[name] = tokenizer.token(own)
        found[name] = own
    ends = ids["eos_token_id"] or tuple(i for i in (found["eos_token"],) if i is not None)
    if tokenizer is not None:
        assert dataclasses.is_dataclass(tokenizer)
        end = found["eos_token"] if found["eos_token"] is not None else next(iter(ends), None)
        tokenizer = dataclasses.replace(tokenizer, bos_id=found["bos_token"], eos_id=end)
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer = _rule(tokenizer, settings)
    return TextRecord(
        tokenizer,
        words,
        found["bos_token"],
        ends,
        found["pad_token"],
        _templates(folder, settings),
        generation,
        {key: value for key, value in settings.items() if key not in ASIDE},
        str(folder),
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. Raises `UserError` for anything else."""
    return files.read_object(path) if path.is_file() else {}


def _check_drawn(path: Path, generation: Mapping[str, Any]) -> None:
    """Raises `UserError` for settings of how tokens are drawn that are none."""
    for key in DRAWN:
        value = generation.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{path} {key}: found {shown(value)}; valid: a finite number, or null")
    if not isinstance(generation.get("do_sample"), bool | None):
        raise UserError(f"{path} do_sample: found {shown(generation['do_sample'])}; valid: true or false")


def _named(folder: Path, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The special tokens that have a name; None where a file says that there is none."""
    given = dict(settings)
    if "added_tokens_decoder" not in settings:  # older folders name them apart
        given |= read_object(folder / "special_tokens_map.json")
    out: dict[str, str | None] = {}
    for name, value in given.items():
        if name not in NAMED:
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise UserError(f"{folder / 'tokenizer_config.json'} {name}: expected a string, found {shown(value)}")
        out[name] = content
    return out


def _ids(folder: Path, name: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that config.json and generation_config.json give `name`, in that order."""
    out: list[int] = []
    for given, file in ((config, "config.json"), (generation, "generation_config.json")):
        value = given.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for i in listed:
            if not isinstance(i, int) or isinstance(i, bool):
                raise UserError(
                    f"{folder / file} {name}: expected an integer or a list of integers, found {shown(value)}"
                )
            if i >= 0 and i not in out:  # -1 is an old way to say that there is none
                out.append(i)
    return tuple(out)


def _with_added(
    tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any], said: Mapping[str, str | None]
) -> Tokenizer:
    """The tokenizer with every token that the folder adds to its vocabulary."""
    listed = settings.get("added_tokens_decoder") or {}
    added = {t["content"]: int(i) for i, t in listed.items() if isinstance(t, dict) and "content" in t}
    added |= {t: i for t, i in read_object(folder / "added_tokens.json").items() if t not in added}
    if isinstance(tokenizer, SentencePieceTokenizer):
        named = {t: tokenizer.find(t) for t in said.values() if t is not None}
        spelled = added | {t: i for t, i in named.items() if i is not None}
        flagged = {str(one.get("content")): one for one in listed.values() if isinstance(one, dict)}
        kept = {t: tuple(f for f in FLAGS if one.get(f)) for t, one in flagged.items()}
        return dataclasses.replace(tokenizer, added={**tokenizer.added, **spelled}, flags=kept)
    if isinstance(tokenizer, HFTokenizer):
        from tokenizers import AddedToken

        new = [t for t in (*added, *filter(None, said.values())) if tokenizer.find(t) is None]
        if new:
            flags = {t["content"]: bool(t.get("special", True)) for t in listed.values() if isinstance(t, dict)}
            tokenizer.inner.add_tokens([AddedToken(t, special=flags.get(t, True), normalized=False) for t in new])
    return tokenizer


def _rule(tokenizer: SentencePieceTokenizer, settings: Mapping[str, Any]) -> SentencePieceTokenizer:
    """A SentencePiece file has no post-processor: ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json``
    decide, and ``legacy`` how a text goes on behind a special token. An absent key means no, as in `transformers` 5.
    A bare file is read as Llama was trained: its beginning token first, and the library's own rule."""
    begins, ends = settings.get("add_bos_token", not settings), settings.get("add_eos_token", False)
    before = (tokenizer.bos_id,) if begins and tokenizer.bos_id is not None else ()
    after = (tokenizer.eos_id,) if ends and tokenizer.eos_id is not None else ()
    return dataclasses.replace(
        tokenizer,
        before=before,
        after=after,
        legacy=bool(settings.get("legacy", not settings)),
        spaced=settings.get("add_prefix_space") is not False,
    )


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Jinja sources by name: files stand before what ``tokenizer_config.json`` holds."""
    out: dict[str, str] = {}
    if (folder / "chat_template.jinja").is_file():
        out["default"] = files.read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        out[path.stem] = files.read_text(path)
    if out:
        return out
    given = settings.get("chat_template")
    if given is None and (folder / "chat_template.json").is_file():
        given = read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, dict):
        return {str(name): str(source) for name, source in given.items()}
    listed = given if isinstance(given, list) else []
    return {
        str(t["name"]): str(t["template"]) for t in listed if isinstance(t, dict) and {"name", "template"} <= set(t)
    }
