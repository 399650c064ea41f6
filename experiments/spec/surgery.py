"""What an arm does to given parameters before they are measured: plugs of `lm.surgery` that train nothing, in order."""

from __future__ import annotations

from typing import Any

from lm.config import is_mapping, plug, to_dict
from lm.errors import UserError, shown
from lm.plug import table
from lm.surgery.base import Surgery

SURGERY = "lm.surgery"


def surgeries(value: object) -> tuple[Surgery, ...]:
    """``("int8", {"name": …, …})`` as plugs; one alone needs no tuple. Raises `UserError` for another value, an unknown
    name, and a plug that is trained."""
    valid = ", ".join(applicable())
    values = (value,) if isinstance(value, str) or is_mapping(value) else value
    if not isinstance(values, (tuple, list)) or not values:
        raise UserError(f"surgery: expected a tuple of names or mappings, found {shown(value)}; valid: {valid}")
    made = [plug(SURGERY, one, f"surgery[{i}]") for i, one in enumerate(values)]
    for i, one in enumerate(made):
        if one.trains:
            name = table(SURGERY).name_of(type(one))
            raise UserError(f"surgery[{i}].name: {name!r} is trained, which goes with train.surgery; valid: {valid}")
    return tuple(made)


def applicable() -> list[str]:
    """The names of the plugs that train nothing."""
    return [name for name, cls in table(SURGERY).items() if not cls().trains]


def written(surgery: tuple[Surgery, ...]) -> dict[str, Any]:
    """``{"surgery": […]}``, JSON-ready, with a hash of the texts that a plug reads; nothing where there is none, so
    that what had none keeps its address."""
    made = [to_dict(one, table(SURGERY)) for one in surgery]
    for said, one in zip(made, surgery, strict=True):
        if one.reads is not None:
            said["texts"] = one.reads.identity()
    return {"surgery": made} if made else {}
