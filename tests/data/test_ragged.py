"""Parts of arrays that stay where they are: every slice is that of the array which NumPy would have made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.ragged import Names, joined, offsets_of, rows


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None)
def test_slices_are_those_of_the_array_made_whole(lengths: list[int], data: st.DataObject) -> None:
    offsets = offsets_of(lengths)
    values = np.arange(offsets[-1], dtype=np.uint16)
    which = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9)), np.int64)
    part = rows(values, offsets, which)
    want = np.concatenate([np.zeros(0, np.uint16), *(values[offsets[i] : offsets[i + 1]] for i in which)])
    both, doubled = joined([part, values]), np.concatenate([want, values])
    assert len(part) == len(want) and part.dtype == np.uint16
    a, b = data.draw(st.integers(0, len(doubled))), data.draw(st.integers(0, len(doubled)))
    for made, expected in ((part, want), (both, doubled)):
        np.testing.assert_array_equal(made[a:b], expected[a:b])
        np.testing.assert_array_equal(np.asarray(made), expected)
    with pytest.raises(ValueError, match="a step of 2"):
        part[::2]


def test_only_what_is_asked_for_is_read() -> None:
    asked = []

    class Told(np.ndarray):
        def __getitem__(self, at: object) -> np.ndarray:  # type: ignore[override]
            asked.append(at)
            return np.asarray(super().__getitem__(at))

    values = np.arange(100, dtype=np.uint16).view(Told)
    part = rows(values, offsets_of([10] * 10), np.array([0, 1, 2, 5, 9]))
    assert part[28:32].tolist() == [28, 29, 50, 51]
    assert asked == [slice(28, 30), slice(50, 52)]


@given(st.lists(st.text(max_size=4), max_size=40), st.data())
@settings(deadline=None)
def test_names_are_a_sequence_of_strings(names: list[str], data: st.DataObject) -> None:
    made = Names.of(iter([*names, "\ud800"]))
    names = [*names, "\ud800"]  # files may be called so
    assert list(made) == names and made == names and made != [*names[:-1], "x"] and len(made) == len(names)
    i = data.draw(st.integers(-len(names), len(names) - 1))
    assert made[i] == names[i] and made[1:3] == names[1:3]
    which = np.array(data.draw(st.lists(st.integers(0, len(names) - 1))), np.int64)
    assert made.take(which) == [names[k] for k in which]
    with pytest.raises(IndexError):
        made[len(names)]
