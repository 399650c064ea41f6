"""A checkpoint with an adapter on it, which is a checkpoint too."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.config import ModelConfig, build
from lm.data.record import FILES, TextRecord, from_folder
from lm.files import user_path
from lm.interop.adapters.change import Change, Changes
from lm.interop.adapters.folder import CONFIG, WEIGHTS, Adapter
from lm.interop.readers import tensors
from lm.interop.readers.base import HUB, PLUS, Reader
from lm.interop.readers.hub import Name
from lm.interop.writers.to_huggingface import family_of
from lm.sharding.layout import Where


class Adapted(Reader):
    """`base` with the adapter at `source`, a folder or ``hf:OWNER/NAME[@REVISION]``."""

    def __init__(self, base: Reader, source: str, named: str | None = None) -> None:
        """`named`: the name of a base that has one, which says where it is."""
        self.base, self.named = base, named
        if source.startswith(HUB):
            name, folder = Name.of(source).fetch(CONFIG, WEIGHTS, *FILES)
            self.adapter, self._place = Adapter(folder), str(name)
        else:
            folder = user_path(source, "--adapter")
            self.adapter, self._place = Adapter(folder), str(folder.absolute())
        self.commit = self._place if source.startswith(HUB) else None
        native = build(ModelConfig, base.model(), "model")
        self.kind = base.model_type() or family_of(native)[0]
        self.adapter.onto(native, self.kind)  # what does not fit is said before anything large is read

    def model(self) -> dict[str, Any]:
        return self.base.model()

    def model_type(self) -> str:
        return self.kind

    def params(self, cfg: ModelConfig, change: Change | None = None, where: Where | None = None) -> dict[str, Any]:
        mine = self.adapter.onto(cfg, self.kind)
        return self.base.params(cfg, mine if change is None else Changes((mine, change)), where)

    def dtype(self) -> str:
        return self.base.dtype()

    def text(self) -> TextRecord:
        """The base's, unless the adapter has a tokenizer or templates of its own."""
        own, base = from_folder(self.adapter.path, {}), self.base.text()
        if own.tokenizer is None:
            return dataclasses.replace(base, templates=own.templates) if own.templates else base
        ends = own.eos_ids or base.eos_ids
        return dataclasses.replace(
            own,
            eos_ids=ends,
            templates=own.templates or base.templates,
            generation=own.generation or base.generation,
        )

    def identity(self) -> str:
        own = self.commit or tensors.content_hash([self.adapter.path / CONFIG, self.adapter.file])
        return f"{self.base.identity()}{PLUS}{own}"

    def place(self) -> str:
        return f"{self.named or self.base.place()}{PLUS}{self._place}"

    def licence(self) -> str | None:
        return self.base.licence()
