"""What a checkpoint says about its text, in one record, from wherever it stands."""

from __future__ import annotations

from lm.data.record.folder import DRAWN, FILES, from_folder
from lm.data.record.gguf import from_gguf
from lm.data.record.named import by_name, from_description
from lm.data.record.record import TextRecord

__all__ = ["DRAWN", "FILES", "TextRecord", "by_name", "from_description", "from_folder", "from_gguf"]
