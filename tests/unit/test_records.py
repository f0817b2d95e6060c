"""Records are classified one by one, and written in batches."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderlib import Outcome, decode_order, encode_order
from orderlib.errors import MAX_FAULTS, Fault, TooLarge
from orderlib.ingestion.records import (
    Batch,
    Headers,
    OffsetRange,
    OrderChange,
    PreparedOrder,
    Record,
    Reject,
    StoredVersion,
    Tombstone,
    Tombstones,
    TopicPartition,
    classify_record,
    may_redrive,
    plan_redrive,
    plan_writes,
    record_time,
)
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE

SAMPLE_ORDER = decode_order(SAMPLE)
TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LATER = TIME + dt.timedelta(days=1)

Stored = dict[str, StoredVersion]


def position(offset: int, partition: int = 0, topic_id: str = "first") -> RecordPosition:
    return RecordPosition(topic_id=topic_id, partition=partition, offset=offset)


def prepared_order(uid: str, content: int, at: RecordPosition | None) -> PreparedOrder:
    return PreparedOrder.of(attrs.evolve(SAMPLE_ORDER, order_uid=uid, sm_id=content), at, TIME if at else None)


def order_with_original(uid: str, content: int, at: RecordPosition, spaces: int) -> PreparedOrder:
    """An order with an unknown field. ``spaces`` change its text, and not its content."""
    text = encode_order(attrs.evolve(SAMPLE_ORDER, order_uid=uid))
    return PreparedOrder.of_text(text[:-1] + b',"later":%d}' % content + b" " * spaces, at, TIME)


def tombstone(uid: str, at: RecordPosition) -> Tombstone:
    return Tombstone(order_uid=uid, position=at, time=TIME)


def version(of: OrderChange, number: int = 1, first_stored_at: dt.datetime | None = LATER) -> StoredVersion:
    return StoredVersion(
        content_sha256=of.content_sha256, position=of.position, first_stored_at=first_stored_at, version_number=number
    )


def originals_after(
    changes: Sequence[OrderChange], stored: Stored, originals: Mapping[str, bytes | None]
) -> dict[str, bytes | None]:
    """Return the original of each order after a batch."""
    writes = plan_writes(changes, stored).writes
    written = {write.order_uid: write.original if isinstance(write, PreparedOrder) else None for write in writes}
    return {**originals, **written}


def after(
    changes: Sequence[OrderChange], stored: Stored, forgotten: Collection[str] = ()
) -> tuple[Stored, list[Outcome]]:
    """Return what is stored after a batch at LATER, and the outcome of each of its changes."""
    plan = plan_writes(changes, stored, forgotten)
    written = {
        write.order_uid: version(write, number, None if isinstance(write, Tombstone) else first_stored or LATER)
        for write, number, first_stored in zip(plan.writes, plan.version_numbers, plan.first_stored, strict=True)
    }
    moved = {uid: attrs.evolve(stored[uid], position=at.position) for uid, at in plan.moves.items()}
    assert not written.keys() & moved.keys()
    return {**stored, **written, **moved}, list(plan.outcomes)


POSITIONS = st.builds(position, st.integers(0, 5), st.integers(0, 1), st.sampled_from(["first", "recreated"]))
UIDS = st.sampled_from(["a", "b"])
CHANGES = st.lists(
    st.builds(prepared_order, UIDS, st.integers(0, 2), st.none() | POSITIONS)
    | st.builds(order_with_original, UIDS, st.integers(0, 1), POSITIONS, st.integers(0, 1))
    | st.builds(tombstone, UIDS, POSITIONS),
    max_size=12,
)


@given(CHANGES, CHANGES, st.sets(st.integers(0, 12)))
def test_the_final_state_does_not_depend_on_where_batches_are_cut(
    before: list[OrderChange], changes: list[OrderChange], cuts: set[int]
) -> None:
    stored: Stored = {}
    for one in before:
        stored, _ = after([one], stored)
    stored = {uid: attrs.evolve(one, first_stored_at=one.first_stored_at and TIME) for uid, one in stored.items()}
    one_by_one = stored
    expected: list[Outcome] = []
    originals: dict[str, bytes | None] = {}
    expected_originals: dict[str, bytes | None] = {}
    for one in changes:
        expected_originals = originals_after([one], one_by_one, expected_originals)
        one_by_one, of_one = after([one], one_by_one)
        expected += of_one
    outcomes: list[Outcome] = []
    bounds = sorted({0, len(changes), *(cut for cut in cuts if cut < len(changes))})
    for begin, end in pairwise(bounds):
        originals = originals_after(changes[begin:end], stored, originals)
        stored, of_batch = after(changes[begin:end], stored)
        outcomes += of_batch
    assert stored == one_by_one
    assert originals == expected_originals
    assert len(outcomes) == len(changes)
    assert outcomes.count(Outcome.ERASED) == expected.count(Outcome.ERASED)


def test_a_tombstone_erases_its_order_and_older_records_do_not_bring_it_back() -> None:
    first, second = (prepared_order("a", content, position(content)) for content in (0, 1))
    at = tombstone("a", position(2))
    erased = {"a": version(at, 0, None)}
    assert after([first, second, at], {}) == (erased, [Outcome.SUPERSEDED, Outcome.SUPERSEDED, Outcome.ERASED])
    replay: list[OrderChange] = [first, second, at, tombstone("a", position(1))]
    assert after(replay, erased) == (erased, [Outcome.SUPERSEDED] * 2 + [Outcome.DUPLICATE] * 2)
    later = tombstone("a", position(3))
    assert after([later], erased) == ({"a": version(later, 0, None)}, [Outcome.DUPLICATE])


def test_a_newer_record_or_a_save_stores_an_erased_order_as_a_first_version() -> None:
    erased = {"a": version(tombstone("a", position(2)), 0, None)}
    for newer in (prepared_order("a", 0, position(3)), prepared_order("a", 0, None)):
        assert after([newer], erased) == ({"a": version(newer)}, [Outcome.STORED])


def test_an_order_that_follows_a_tombstone_in_its_batch_is_a_first_version() -> None:
    stored = {"a": version(prepared_order("a", 0, position(0)), 7, TIME)}
    last = prepared_order("a", 2, position(3))
    changes: list[OrderChange] = [prepared_order("a", 1, position(1)), tombstone("a", position(2)), last]
    assert after(changes, stored) == ({"a": version(last)}, [Outcome.SUPERSEDED, Outcome.ERASED, Outcome.STORED])


def test_a_replayed_tombstone_does_not_erase_a_newer_order() -> None:
    stored = {"a": version(prepared_order("a", 0, position(3)))}
    assert after([tombstone("a", position(2))], stored) == (stored, [Outcome.SUPERSEDED])


def test_the_last_record_of_an_order_is_stored_and_the_earlier_ones_are_superseded() -> None:
    first, second, third = (prepared_order("a", content, position(content)) for content in (0, 1, 2))
    stored, outcomes = after([first, second, third], {})
    assert outcomes == [Outcome.SUPERSEDED, Outcome.SUPERSEDED, Outcome.STORED]
    assert stored == {"a": version(third, 3)}


def test_a_replay_never_overwrites_a_newer_version() -> None:
    newest = {"a": version(prepared_order("a", 2, position(2)))}
    stored, outcomes = after([prepared_order("a", 0, position(0)), prepared_order("a", 1, position(1))], newest)
    assert outcomes == [Outcome.SUPERSEDED, Outcome.SUPERSEDED]
    assert stored == newest


def test_equal_content_is_a_duplicate_that_only_moves_the_position_forward() -> None:
    stored = {"a": version(prepared_order("a", 0, position(3)))}
    later, earlier = prepared_order("a", 0, position(4)), prepared_order("a", 0, position(1))
    assert after([later], stored) == ({"a": version(later)}, [Outcome.DUPLICATE])
    assert after([earlier], stored) == (stored, [Outcome.DUPLICATE])
    assert plan_writes([later], stored).writes == ()


def test_the_same_record_with_other_content_is_a_new_version() -> None:
    """A release that knows more fields decodes it again after a rewind."""
    stored = {"a": version(prepared_order("a", 0, position(3)))}
    again = prepared_order("a", 1, position(3))
    assert after([again], stored) == ({"a": version(again, 2)}, [Outcome.STORED])
    assert after([again], {"a": version(again, 2)}) == ({"a": version(again, 2)}, [Outcome.DUPLICATE])
    assert plan_writes([again], {"a": version(again, 2)}).moves == {}


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sets(st.integers(0, 24)),
)
def test_a_rewind_by_a_release_that_knows_more_fields_stores_what_was_missed_and_a_second_one_nothing(
    log: list[tuple[str, int]], upgraded_at: int, cuts: set[int]
) -> None:
    """The earlier release cannot tell contents 0 and 1, nor 2 and 3."""
    new = [prepared_order(uid, content, position(offset)) for offset, (uid, content) in enumerate(log)]
    old = [prepared_order(uid, content // 2, position(offset)) for offset, (uid, content) in enumerate(log)]
    stored = before = dict[str, StoredVersion]()
    for handled in (old[:upgraded_at] + new[upgraded_at:], new, new):
        before = stored
        bounds = sorted({0, len(log), *(cut % len(log) for cut in cuts)})
        for begin, end in pairwise(bounds):
            stored, _ = after(handled[begin:end], stored)
    last = {one.order_uid: one for one in new}
    assert {uid: (one.content_sha256, one.position) for uid, one in stored.items()} == {
        uid: (one.content_sha256, one.position) for uid, one in last.items()
    }
    assert stored == before


@pytest.mark.parametrize("elsewhere", [position(0, partition=1), position(0, topic_id="recreated"), None])
def test_between_partitions_the_record_handled_last_is_stored(elsewhere: RecordPosition | None) -> None:
    stored = {"a": version(prepared_order("a", 0, position(9)))}
    other = prepared_order("a", 1, elsewhere)
    assert after([other], stored) == ({"a": version(other, 2)}, [Outcome.STORED])


@pytest.mark.parametrize(
    ("stored_at", "may"),
    [
        (position(4), True),
        (position(5), False),
        (position(6), False),
        (position(4, partition=1), False),
        (position(4, topic_id="recreated"), False),
        (None, False),
    ],
)
def test_a_redriven_reject_replaces_only_an_earlier_version_of_its_partition(
    stored_at: RecordPosition | None, may: bool
) -> None:
    reject = prepared_order("a", 1, position(5))
    stored = {"a": version(prepared_order("a", 0, stored_at))}
    assert may_redrive(reject, stored["a"]) is may
    plan = plan_redrive([reject], stored)
    assert plan.outcomes == (Outcome.STORED if may else Outcome.SUPERSEDED,)
    assert plan.writes == ((reject,) if may else ())
    assert plan.moves == {}


@pytest.mark.parametrize("at", [position(6), position(4, partition=1)])
def test_a_redrive_does_not_store_an_order_that_was_erased_later_or_elsewhere(at: RecordPosition) -> None:
    erased = {"a": version(tombstone("a", at), 0, None)}
    assert plan_redrive([prepared_order("a", 1, position(5))], erased).outcomes == (Outcome.SUPERSEDED,)


def test_a_redriven_tombstone_erases_only_an_earlier_version_of_its_partition() -> None:
    for offset, outcome in ((4, Outcome.ERASED), (6, Outcome.SUPERSEDED)):
        stored = {"a": version(prepared_order("a", 0, position(offset)))}
        assert plan_redrive([tombstone("a", position(5))], stored).outcomes == (outcome,)


def test_a_redriven_reject_of_a_missing_order_is_stored() -> None:
    reject = prepared_order("a", 1, position(5))
    assert plan_redrive([reject], {}).writes == (reject,)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (SAMPLE, None),
        (None, "malformed_json"),
        (b"", "malformed_json"),
        (b"{}", "invalid_order"),
        (SAMPLE + b" " * 1_000, "too_large"),
    ],
)
def test_a_record_is_an_order_or_a_reject_with_all_of_its_content(value: bytes | None, code: str | None) -> None:
    record = Record(position=position(7), time=TIME, topic="orders", key=b"k", value=value, headers=(("h", None),))
    classified = classify_record(record, max_bytes=len(SAMPLE) + 100)
    if code is None:
        assert classified == PreparedOrder.of(SAMPLE_ORDER, position(7), TIME)
    else:
        assert isinstance(classified, Reject)
        assert (classified.code, classified.record) == (code, record)
        assert classified.total_faults >= 1


@pytest.mark.parametrize("key", [b"a", b"..a", b"A-Z.0:9_", b"k" * 128])
def test_a_record_with_an_order_uid_and_no_value_is_a_tombstone_only_if_that_is_switched_on(key: bytes) -> None:
    record = Record(position=position(7), time=TIME, topic="orders", key=key, value=None)
    assert isinstance(classify_record(record, 100), Reject)
    assert classify_record(record, 100, tombstones=Tombstones.ERASE) == tombstone(key.decode(), position(7))


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"a", b""), *((key, None) for key in (None, b"", b"..", b"a b", b"a\n", b"\xff", b"k" * 129))],
)
def test_other_records_without_an_order_are_rejects_all_the_same(key: bytes | None, value: bytes | None) -> None:
    record = Record(position=position(7), time=TIME, topic="orders", key=key, value=value)
    assert isinstance(classify_record(record, 100, tombstones=Tombstones.ERASE), Reject)


@pytest.mark.parametrize(
    "timestamp_ms", [-(2**63), -62135596800001, -1, 0, 253402300799999, 253402300800000, 2**63 - 1]
)
def test_any_timestamp_becomes_a_time_that_postgresql_and_python_can_represent(timestamp_ms: int) -> None:
    time = record_time(timestamp_ms)
    assert time.utcoffset() == dt.timedelta(0)
    if -62135596800000 <= timestamp_ms <= 253402300799999:
        assert abs(time.timestamp() - timestamp_ms / 1000) < 0.001


def test_a_batch_without_some_partitions_has_the_records_of_the_others() -> None:
    records = [
        Record(position=position(p, partition=p), time=TIME, topic="orders", key=None, value=SAMPLE) for p in range(3)
    ]
    partitions = [TopicPartition("orders", number) for number in range(3)]
    batch = Batch(
        topic_ids={"orders": "first"},
        ranges={p: OffsetRange(expected_offset=0, next_offset=1) for p in partitions},
        classified=tuple((record, classify_record(record, 10_000)) for record in records),
    )
    rest = batch.without({partitions[0], partitions[2]})
    assert rest.ranges == {partitions[1]: batch.ranges[partitions[1]]}
    assert rest.classified == (batch.classified[1],)


@pytest.mark.parametrize(
    ("key", "value", "headers", "left_out"),
    [
        (b"k" * 40, b"v" * 60, (), []),
        (b"k" * 40, b"v" * 61, (), ["value"]),
        (b"k" * 40, b"v" * 61, (("h", b""),), ["value", "headers"]),
        (None, None, (("h", b""),), ["headers"]),
    ],
)
def test_a_reject_leaves_out_and_names_the_parts_that_fit_into_no_row(
    monkeypatch: pytest.MonkeyPatch, key: bytes | None, value: bytes | None, headers: Headers, left_out: list[str]
) -> None:
    monkeypatch.setattr("orderlib.ingestion.records._ROW_BYTES", 100)
    record = Record(position=position(7), time=TIME, topic="orders", key=key, value=value, headers=headers)
    reject = classify_record(record, max_bytes=10)
    assert isinstance(reject, Reject)
    assert [fault.path for fault in reject.faults[1:]] == left_out == list(record.unstorable)
    assert reject.total_faults == 1 + len(left_out)


def test_a_reject_of_many_faults_names_the_parts_that_are_not_stored() -> None:
    record = Record(position=position(7), time=TIME, topic="orders", key=None, value=b"{}", headers=None)
    reject = Reject.of(record, TooLarge([Fault(path="$", expected="", found="")] * (MAX_FAULTS + 1)))
    assert len(reject.faults) == MAX_FAULTS
    assert reject.faults[-1].path == "headers"
    assert reject.total_faults == MAX_FAULTS + 2


@given(CHANGES, CHANGES, st.integers(0, 12))
def test_a_forgotten_order_is_never_stored_and_leaves_the_other_orders_as_they_are(
    before: list[OrderChange], changes: list[OrderChange], cut: int
) -> None:
    stored, _ = after(before, {})
    others = {uid: one for uid, one in stored.items() if uid != "a"}
    expected, _ = after([one for one in changes if one.order_uid != "a"], others)
    stored, first = after(changes[:cut], others, forgotten={"a"})
    stored, second = after(changes[cut:], stored, forgotten={"a"})
    assert stored == expected
    is_forgotten = [outcome == Outcome.FORGOTTEN for outcome in first + second]
    assert is_forgotten == [one.order_uid == "a" for one in changes]


def test_a_redrive_does_not_store_a_forgotten_order() -> None:
    plan = plan_redrive([prepared_order("a", 0, position(0))], {}, {"a"})
    assert (plan.outcomes, plan.writes) == ((Outcome.FORGOTTEN,), ())
