"""UTF-8 bytes as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.huggingface import HFTokenizer

if TYPE_CHECKING:
    import tokenizers


NAMES = {"bos": "<s>", "eos": "</s>"}


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 … 255, then bos and eos, each of which may be None."""

    bos_id: int | None = 256
    eos_id: int | None = 257

    @property
    def vocab_size(self) -> int:
        return 1 + max([255, *(i for i in (self.bos_id, self.eos_id) if i is not None)])

    @property
    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "kind": "bytes"}

    def token(self, i: int) -> str:
        if i < 256:
            return bytes([i]).decode("latin-1")
        return {self.bos_id: NAMES["bos"], self.eos_id: NAMES["eos"]}.get(i, f"<unused{i}>")

    def find(self, token: str) -> int | None:
        return {NAMES["bos"]: self.bos_id, NAMES["eos"]: self.eos_id}.get(token)

    def save(self, folder: Path) -> dict[str, object]:
        """Bytes are saved as byte-level BPE without merges."""
        return HFTokenizer(self._as_bpe(), self.bos_id, self.eos_id).save(folder)

    def _as_bpe(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes, in byte order
        other = iter(range(256, 512))
        letters = {b: chr(b) if b in printable else chr(next(other)) for b in range(256)}
        inner = tokenizers.Tokenizer(models.BPE(vocab={c: b for b, c in letters.items()}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        special = {self.bos_id: NAMES["bos"], self.eos_id: NAMES["eos"]}
        last = max((i for i in special if i is not None), default=255)
        # The library numbers special tokens in the order in which they are added.
        inner.add_special_tokens([special.get(i, f"<unused{i}>") for i in range(256, last + 1)])
        return inner
