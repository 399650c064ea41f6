"""Documents from Hugging Face ``datasets``: of the Hub, of a folder saved to disk, or of a folder of data files."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.data.texts.document import Document
from lm.data.texts.files import field_of
from lm.errors import UserError, nearest
from lm.files import user_path

HOW_TO_GET = "pip install datasets (extra data)"

_SPEC = re.compile(r"(?P<name>[^:#?]+)(?::(?P<split>[^#?]+))?(?:#(?P<field>[^?]+))?(?:\?(?P<options>.*))?")
_VALID = "valid: hf:[OWNER/]NAME, hf:OWNER/NAME/CONFIG or hf:./FOLDER, then [:SPLIT][#FIELD][?streaming&take=N]"


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("datasets") is not None


def read(member: str | None) -> Iterator[Document]:
    """One document per example of ``[owner/]name``, ``owner/name/config`` or a folder; then ``[:split][#field]``.

    ``?streaming`` at the end reads the examples as they come, instead of a copy of the whole dataset that the library
    would make first; ``?take=N`` reads the first N of them, ``?streaming&take=N`` does both.

    The split is ``train`` unless given, and of anything but a folder saved to disk may be a slice: ``train[:1%]``; the
    field is ``text``, else the only one of strings. A name that does not begin with ``.``, ``/`` or ``~`` is one of the
    Hub: the library takes it from its own cache, else downloads it, except where ``HF_DATASETS_OFFLINE`` is set.
    Raises `UserError` when the library, the dataset, the split or the field is absent.
    """
    rows, where, asked = _open(member)
    names = _columns(rows, where)
    field = asked or _default_field(rows, names, where)
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        raise UserError(f"texts: {where} has no field {field!r}{nearest(column, names)}; fields: {', '.join(names)}")
    licence = rows.info.license or "not stated by the dataset"
    source = rows.info.homepage or where
    count, some = 0, False
    for row in _examples(rows.select_columns([column]), where):  # the others may be images, which would be decoded
        text = field_of(row, field, f"{where}[{count}]")
        if text:
            some = True
            yield Document(f"{where}[{count}]", text, source, licence)
        count += 1
    if not some:
        raise UserError(f"texts: {where}: field {field!r} of all {count} examples is empty")


def _examples(rows: Any, where: str) -> Iterator[Mapping[str, object]]:
    """Raises `UserError` naming the example where the files end in a fault, as a streamed one may late."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except Exception as e:  # of any format, or of the network
        raise UserError(f"texts: {where}[{count}]: cannot be read ({_first_line(e)}); valid: whole files") from None


def _columns(rows: Any, where: str) -> list[str]:
    """Of a stream, whose files may not say it, those of its first example."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(_examples(rows, where), {}))


def records(member: str, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, place, example) of every example, with those of `columns` that there are; the first must be there."""
    rows, where, field = _open(member)
    names = _columns(rows, where)
    if field is not None:
        raise UserError(f"texts: {where}: '#{field}' names a field; conversations are in {columns[0]!r}")
    if columns[0] not in names:
        raise UserError(
            f"texts: {where} has no field {columns[0]!r}{nearest(columns[0], names)}; fields: {', '.join(names)}"
        )
    for i, row in enumerate(_examples(rows.select_columns([name for name in columns if name in names]), where)):
        yield f"{where}[{i}]", f"{where}[{i}]", dict(row)


def _open(member: str | None) -> tuple[Any, str, str | None]:
    """The examples of a spec, their place, and the field it names."""
    parsed = _SPEC.fullmatch(member or "")
    if parsed is None:
        raise UserError(f"texts: 'hf:{member or ''}' is not a dataset; {_VALID}")
    if not installed():
        raise UserError(f"texts: 'hf:{member}' needs a package that is not here; get it with: {HOW_TO_GET}")
    name, split = parsed["name"], parsed["split"] or "train"
    where = f"hf:{name}:{split}"
    streaming, take = _options(parsed["options"], where)
    rows = (_folder if name[0] in "./~" else _hub)(name, split, where, streaming)
    if take is not None:
        rows = rows.take(take)
    return rows, where, parsed["field"]


def _options(options: str | None, where: str) -> tuple[bool, int | None]:
    """Whether to stream, and how many examples to take."""
    streaming, take = False, None
    for item in (options or "").split("&") if options is not None else []:
        key, equals, value = item.partition("=")
        if key == "streaming" and not equals:
            streaming = True
        elif key == "take" and value.isdecimal() and int(value):
            take = int(value)
        else:
            raise UserError(f"texts: {where}: unknown option {item!r}{nearest(key, ('streaming', 'take'))}; {_VALID}")
    return streaming, take


def _hub(name: str, split: str, where: str, streaming: bool) -> Any:
    parts = name.split("/")
    if len(parts) > 3 or "" in parts:
        raise UserError(f"texts: 'hf:{name}' is not a dataset; {_VALID}")
    return _load("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split, where, streaming)


def _folder(name: str, split: str, where: str, streaming: bool) -> Any:
    """Of ``Dataset.save_to_disk`` (with splits or without), or of Parquet, JSON, CSV or text files."""
    path = user_path(name, "texts")
    if not path.is_dir():
        close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"texts: {where}: no such folder{close}; valid: a folder saved to disk or one of data files")
    whole, splits = (path / "state.json").is_file(), (path / "dataset_dict.json").is_file()
    if not (whole or splits):
        return _load(str(path), None, split, where, streaming)
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as e:  # the library raises a dozen unrelated types for a damaged folder
        raise UserError(f"texts: {where} cannot be read ({_first_line(e)}); valid: a folder saved to disk") from None
    if splits:
        names = list(found)
    else:
        names = [str(found.split or "train")]
        found = {names[0]: found}
    if split not in names:
        raise UserError(f"texts: {where}: no split {split!r}{nearest(split, names)}; valid: {', '.join(names)}")
    return found[split]


def _load(path: str, config: str | None, split: str, where: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split, streaming=streaming)
    except Exception as e:  # as above, and whatever the network ends in
        raise UserError(
            f"texts: {where} cannot be read ({_first_line(e)}); valid: a dataset, configuration and split of the Hub "
            "or of the library's cache, or ./FOLDER of data files"
        ) from None


def _default_field(rows: Any, names: Sequence[str], where: str) -> str:
    """`text` if there is one, else the only one of strings."""
    if "text" in names:
        return "text"
    if rows.features is None:  # of a stream
        strings = [n for n, value in next(_examples(rows, where), {}).items() if isinstance(value, str)]
    else:
        kinds = {n: getattr(kind, "dtype", "") for n, kind in rows.features.items()}
        strings = [n for n, kind in kinds.items() if kind in ("string", "large_string")]
    if len(strings) != 1:
        raise UserError(
            f"texts: {where} has no field 'text'{nearest('text', names)}; fields: {', '.join(names)}; "
            "name one with #field"
        )
    return str(strings[0])
