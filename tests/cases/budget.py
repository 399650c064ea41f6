"""How many programs the tests of one class may compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from programs import counted


class Budget:
    """`PROGRAMS`: at most so many; those that an earlier class compiled are not compiled again, and what stands in
    `programs.uncovered` (random parameters, operations without jit) does not count."""

    PROGRAMS: ClassVar[int]

    @classmethod
    def allowed(cls) -> int:
        return cls.PROGRAMS

    @pytest.fixture(scope="class", autouse=True)
    def _budget(self, request: pytest.FixtureRequest) -> Iterator[None]:
        with counted() as names:
            yield
        case: type[Budget] = request.cls
        assert len(names) <= case.allowed(), f"{len(names)} programs, {case.allowed()} allowed: {names}"
