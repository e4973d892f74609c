"""Records in a mapped file: what is read equals what was written, type by type; damage is noticed; nothing is run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.data.records import decode, encode, read_records, write_records

RECORD: dict[str, Any] = {
    "img_path": "a/ä.jpg",
    "height": 3,
    "seg_map_path": None,
    "instances": [{"bbox": [0.1, 2, 1e-300, 1.0], "ignore_flag": True, 7: b"x"}],
    "classes": ("one", ("two",)),
    "labels": np.array([1, 2], np.int64),
    "relations": np.eye(3, dtype=np.float32),
}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types at every depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    return bool(one == other)


def test_what_is_read_equals_what_was_written(tmp_path: Path) -> None:
    place = tmp_path / "x.records"
    records = [RECORD, {}, {"number": 2**63}] * 3
    write_records(place, RECORD, iter(records))
    found = read_records(place)
    assert found is not None
    facts, kept = found
    assert same(facts, RECORD)
    assert len(kept) == 9
    assert all(same(copy.deepcopy(one), other) for one, other in zip(kept, records, strict=True))
    assert same(copy.deepcopy(kept[-1]), records[-1])
    with pytest.raises(IndexError):
        kept[9]
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_record_is_the_readers_own(tmp_path: Path) -> None:
    write_records(tmp_path / "x", None, [RECORD])
    (_, kept) = read_records(tmp_path / "x") or pytest.fail("unreadable")
    taken = copy.deepcopy(kept[0])
    taken["instances"][0]["bbox"][0] = 5
    taken["labels"][0] = 5
    assert same(copy.deepcopy(kept[0]), RECORD)


def test_a_worker_gets_the_place_not_the_records(tmp_path: Path) -> None:
    write_records(tmp_path / "x", None, [{"text": "y" * 100_000}] * 3)
    (_, kept) = read_records(tmp_path / "x") or pytest.fail("unreadable")
    sent = pickle.dumps(kept)
    assert len(sent) < 1000
    assert pickle.loads(sent)[2] == kept[2]


def test_no_records_are_records(tmp_path: Path) -> None:
    write_records(tmp_path / "x", {"a": 1}, [])
    facts, kept = read_records(tmp_path / "x") or pytest.fail("unreadable")
    assert facts == {"a": 1}
    assert len(kept) == 0


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner) | st.tuples(inner),
    )
)
def test_any_json_value_survives(value: Any) -> None:
    assert same(decode(encode(value)), value)


class Odd(dict[str, Any]):
    pass


@pytest.mark.parametrize(
    "value", [Odd(a=1), np.float64(1), np.array([{}]), {1, 2}, 2**64, "\ud800", Path("a")], ids=lambda v: repr(v)[:20]
)
def test_what_has_no_exact_form_is_refused_and_leaves_no_file(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        write_records(tmp_path / "x", None, [{"a": 1}, {"a": value}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["start", "end", "empty", "other"])
def test_a_damaged_file_is_none(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "x"
    write_records(place, {"a": 1}, [RECORD] * 3)
    content = place.read_bytes()
    damaged = {"start": content[64:], "end": content[:-3], "empty": b"", "other": b"z" * len(content)}[damage]
    place.write_bytes(damaged)
    assert read_records(place) is None
    assert read_records(tmp_path / "nowhere") is None


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path / "sprung").touch, ()

    write_records(tmp_path / "x", None, [{"a": pickle.dumps(Trap())}])
    (_, kept) = read_records(tmp_path / "x") or pytest.fail("unreadable")
    assert isinstance(kept[0]["a"], bytes)
    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    assert read_records(tmp_path / "x") is None
    assert not (tmp_path / "sprung").exists()
