"""Documents from TensorFlow Datasets prepared as array_record files, read without TensorFlow."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lm.data.texts.document import Document
from lm.data.texts.files import field_of
from lm.errors import UserError, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

HOW_TO_GET = "pip install tensorflow-datasets array_record (extra data)"

# The version of a dataset follows a colon too, so it belongs to the name: name[/config][:1.2.3][:split][#field].
_SPEC = re.compile(r"(?P<name>[\w/.\-]+(?::(?:\d+|\*)(?:\.(?:\d+|\*)){2})?)(?::(?P<split>[^#]+))?(?:#(?P<field>.+))?")


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def installed() -> bool:
    """Whether the packages are there; neither is imported."""
    return all(importlib.util.find_spec(p) is not None for p in ("tensorflow_datasets", "array_record"))


def read(member: str | None) -> Iterator[Document]:
    """One document per example of ``name[/config][:version][:split][#field]``; default split train, field text.

    Datasets are looked for under ``TFDS_DATA_DIR`` (else the library's own default folder) and never downloaded here.
    Raises `UserError` when the library, the dataset, its array_record files, the split or the field is absent.
    """
    parsed = _SPEC.fullmatch(member or "")
    if parsed is None:
        raise UserError(f"texts: 'tfds:{member or ''}' is not a dataset; valid: tfds:name[/config][:split][#field]")
    name, split = parsed["name"], parsed["split"] or "train"
    if not installed():
        raise UserError(f"texts: 'tfds:{member}' needs two packages that are not here; get them with: {HOW_TO_GET}")
    import tensorflow_datasets as tfds

    folder = os.environ.get("TFDS_DATA_DIR")
    where = f"tfds:{name}:{split}"
    absl = logging.getLogger("absl")  # warns about every folder that is not a dataset; the error below says it once
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        rows: Any = tfds.data_source(name, split=split, data_dir=folder, download=False)
        info = rows.dataset_info
        count = len(rows)
    except Exception as e:  # the library raises a dozen unrelated types for a dataset that is not there
        raise UserError(
            f"texts: {where} cannot be read from {folder or 'the default folder of tfds'} ({_first_line(e)}); get it "
            f"with: tfds build {name.split(':')[0]} --file_format=array_record, and set TFDS_DATA_DIR to its folder"
        ) from None
    finally:
        absl.setLevel(level)
    field = parsed["field"] or _default_field(info.features, where)
    licence = info.redistribution_info.license or "not stated by the dataset"
    source = info.homepage or where
    some = False
    for i in range(count):
        text = field_of(rows[i], field, f"{where}[{i}]")
        if text:
            some = True
            yield Document(f"{where}[{i}]", text, source, licence)
    if not some:
        raise UserError(f"texts: {where}: field {field!r} of all {count} examples is empty")


def _default_field(features: tfds.features.FeatureConnector, where: str) -> str:
    """`text` if there is one, else the only feature of type Text."""
    import tensorflow_datasets as tfds

    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    texts = [n for n in names if isinstance(features[n], tfds.features.Text)]
    if "text" in names or len(texts) != 1:
        if "text" not in names:
            raise UserError(
                f"texts: {where} has no field 'text'{nearest('text', names)}; fields present: {', '.join(names)}; "
                "name one with #field"
            )
        return "text"
    return str(texts[0])
