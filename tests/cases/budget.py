"""How many programs the tests of one class may compile, and what they compute once for all of its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Generic, TypeVar

import pytest
from programs import counted

Made = TypeVar("Made")


class once(Generic[Made]):  # read like a property
    """A property computed once per class: pytest makes a new instance for every test."""

    def __init__(self, compute: Callable[..., Made]) -> None:
        self.compute, self.values = compute, {}  # type: tuple[Callable[..., Made], dict[type, Made]]

    def __get__(self, case: object, owner: type) -> Made:
        if owner not in self.values:
            self.values[owner] = self.compute(case)
        return self.values[owner]


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
