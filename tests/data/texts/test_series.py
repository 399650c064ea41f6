"""Series as texts and values as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.data import record, texts
from lm.data.texts import series
from lm.data.texts.document import Document
from lm.data.tokenizers.values import ValueTokenizer, from_description, numbers
from lm.errors import UserError


def tokenizer_of(spec: str, documents: Any, cache: Path) -> Any:
    """The tokenizer that the setting names."""
    return record.by_name(spec, documents, cache).tokenizer


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    rows = ["2013-01-01T00:00:00Z,A,1.0", "2013-01-01T01:00:00Z,A,2.0", "2013-01-01T04:00:00Z,A,8.0"]
    rows += ["2013-01-01T05:00:00Z,A,", "2013-01-01T06:00:00Z,A,4.0", "2013-01-01T00:00:00Z,B,7.0"]
    path.write_text("time,site,value\n" + "\n".join(rows) + "\n")
    return path


def test_rows_on_a_regular_grid(table: Path) -> None:
    """Absent hours and absent values are interpolated; other series of the table are left out."""
    got = series.values(f"{table}#value?where=site:A&time=time")
    np.testing.assert_allclose(got, [1, 2, 4, 6, 8, 6, 4])
    np.testing.assert_allclose(series.values(f"{table}#value?where=site:A&time=time&step=2"), [1, 4, 8, 4])
    np.testing.assert_allclose(series.values(f"{table}#value?where=site:A"), [1, 2, 8, 6, 4])


def test_windows_are_documents(table: Path) -> None:
    spec = f"series:{table}#value?where=site:A&time=time&length=3&stride=2&stop=0.8"
    docs = texts.documents(spec)
    assert [[float(x) for x in d.text.split()] for d in docs] == [[1, 2, 4], [4, 6, 8]]
    assert len({d.name for d in docs}) == 2
    assert len(texts.documents(f"series:{table}#value?where=site:A")) == 1


def test_real_series() -> None:
    demand = series.values("fpp2/elecdemand#Demand")
    assert demand.shape == (17520,) and 1.0 < demand.min() < demand.max() < 10.0  # gigawatts, a year of half hours
    assert abs(demand[0] - 3.914647) < 1e-6
    hourly = series.values("nycflights13/weather#temp?time=time_hour&where=origin:JFK")
    assert hourly.shape == (8730,) and np.isfinite(hourly).all() and 0 < hourly.min() < hourly.max() < 110
    with pytest.raises(UserError, match=r"no table 'elecdemnd' \(did you mean 'elecdemand'\?\)"):
        series.values("fpp2/elecdemnd#Demand")
    with pytest.raises(UserError, match=r"no package 'fpp22' \(did you mean 'fpp2'\?\)"):
        series.values("fpp22/elecdemand#Demand")


BAD = [
    ("", "is no column of a table"),
    ("t.csv", "is no column of a table"),
    ("{}#valu", r"no column 'valu' \(did you mean 'value'\?\)"),
    ("{}#value?lenght=3", r"unknown key 'lenght' \(did you mean 'length'\?\)"),
    ("{}#value?where=site:C", "no row has site = 'C'"),
    ("{}#site", "valid: a column of numbers"),
    ("{}#value?time=site", "valid: a column of ISO times"),
    ("{}#value?time=time", "times do not increase"),
    ("{}#value?start=0.9&stop=0.1", "valid: 0 <= start < stop <= 1"),
    ("{}#value?start=x", "start='x' is not a number"),
    ("{}#value?length=99", "windows of 99 values"),
    ("{}#value?length=2&stride=0", "windows of 2 values, 0 apart"),
    ("{}.csv#value", "cannot be read as CSV"),
]


@pytest.mark.parametrize(("spec", "message"), BAD)
def test_mistakes_are_named(table: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts.documents(f"series:{spec.format(table)}") if spec else series.read(None)


def test_values_round_trip() -> None:
    """A value comes back within half a bin; the scale is that of the first `context` values alone."""
    tokenizer = ValueTokenizer(bins=50, context=4, low=-1.0, high=3.0)
    values = np.array([1.0, -2.0, 3.0, 2.0, 4.0, -1.0])
    assert tokenizer.scale(values) == 2.0
    text = " ".join(map(str, values))
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 50 and max(ids) < 50 and min(ids) >= 0
    np.testing.assert_allclose(tokenizer.centres(ids), values / 2, atol=0.5 * 4 / 50 + 1e-12)
    np.testing.assert_allclose([float(x) for x in tokenizer.decode(ids).split()], values / 2, atol=0.041)
    assert tokenizer.encode(" ".join(map(str, 7 * values))) == ids
    assert tokenizer.quantise(np.array([-9.0, 9.0])).tolist() == [0, 49]
    assert tokenizer.scale(np.zeros(5)) == 1.0 and tokenizer.encode("") == []


def test_range_is_that_of_the_texts(tmp_path: Path) -> None:
    docs = [Document("a", "1 1 3", "", ""), Document("b", "10 10 5", "", "")]
    tokenizer = tokenizer_of("values:8:2", lambda: docs, tmp_path)
    assert isinstance(tokenizer, ValueTokenizer)
    np.testing.assert_allclose([tokenizer.low, tokenizer.high], [0.5 - 0.125, 3.0 + 0.125])
    assert from_description(tokenizer.describe()) == tokenizer


@pytest.mark.parametrize("spec", ["values:8", "values:a:b", "values:1:4", "values:8:0", "values:8:4:2"])
def test_misspelt_tokenizers(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.data\.tokenizer: 'values:"):
        tokenizer_of(spec, lambda: [Document("a", "1 2", "", "")], tmp_path)


def test_words_are_no_values(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not convert.*numbers alone"):
        tokenizer_of("values:8:2", lambda: [Document("a", "1 two", "", "")], tmp_path)
    with pytest.raises(UserError, match="not finite"):
        numbers("1 inf", "a")
