"""Model cards, README.md with a head in YAML: what one says, and the one beside a checkpoint that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lm.config import ModelConfig, to_dict

FILE = "README.md"


def licence(path: Path) -> str | None:
    """The licence in the head of a card; None where there is no card, no head, or nothing of the kind in it."""
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(path) if path.is_file() else None
    except Exception:  # any text may be called README.md
        return None
    found = (said or {}).get("license")
    return found if isinstance(found, str) else None


def written(
    name: str, cfg: ModelConfig, *, base: str, identity: str, licence: str | None, done: Sequence[str], hub: str | None
) -> str:
    """A card: where the checkpoint comes from, what was done to it, and its settings.

    `name`: its headline; `base`: what it was read from, known as `identity`; `hub`: the repository, of a base that is
    one.
    """
    from huggingface_hub import ModelCardData

    head = ModelCardData(license=licence, base_model=hub, library_name="transformers").to_yaml()
    steps = "".join(f"- {one}\n" for one in done)
    settings = json.dumps(to_dict(cfg), indent=1)
    stated = f"Its licence: {licence}." if licence else "It states no licence."
    return (
        f"---\n{head}\n---\n\n# {name}\n\nMade from `{base}` (`{identity}`). {stated}\n\n{steps}\n"
        f"The model in Decoder Lab's terms:\n\n```json\n{settings}\n```\n"
    )
