"""Records and snapshots in memory: what ``Reconciliation`` calls a discrepancy, and what it calls not proved."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Sequence

import attrs

from orderlib import decode_order, encode_order
from orderlib.ingestion.reconcile import (
    Reconciliation,
    SnapshotErased,
    SnapshotOrder,
    SnapshotOriginal,
    SnapshotReject,
    TopicState,
)
from orderlib.ingestion.records import PreparedOrder, Record, Reject, StoredOffset, classify_record
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE

SAMPLE_ORDER = decode_order(SAMPLE)
TOPIC, TOPIC_ID, OTHER_TOPIC_ID = "orders", "BBBBBBBBBBBBBBBBBBBBBB", "AAAAAAAAAAAAAAAAAAAAAA"
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
STORED_AT = START + dt.timedelta(hours=1)
USUAL_BYTES = 8 * 2**20


def order(uid: str, content: int = 0) -> bytes:
    return encode_order(attrs.evolve(SAMPLE_ORDER, order_uid=uid, sm_id=content))


def with_unknown(uid: str, number: int = 1, space: str = "") -> bytes:
    """Return an order with an unknown field. The space changes its bytes, and not its content."""
    return order(uid)[:-1] + f',{space}"later":{number}}}'.encode()


def record(offset: int, value: bytes | None, key: bytes = b"key", topic_id: str = TOPIC_ID) -> Record:
    position = RecordPosition(topic_id=topic_id, partition=0, offset=offset)
    return Record(position=position, time=START + dt.timedelta(seconds=offset), topic=TOPIC, key=key, value=value)


def stored_order(of: Record, original: bytes | None = None) -> SnapshotOrder:
    """Return the order that a record stored. The original may be that of an earlier record with the same content."""
    assert of.value is not None
    prepared = PreparedOrder.of_text(of.value)
    original = original or prepared.original
    return SnapshotOrder(
        order_uid=prepared.order_uid,
        order=decode_order(of.value),
        content_sha256=prepared.content_sha256,
        topic_id=of.position.topic_id,
        partition=of.position.partition,
        offset=of.position.offset,
        source_time=of.time,
        stored_at=STORED_AT,
        times_in_order=True,
        has_original=original is not None,
        original=None if original is None else SnapshotOriginal.of(original, prepared.content_sha256),
    )


def stored_reject(of: Record, max_bytes: int = USUAL_BYTES, outcome: str | None = None) -> SnapshotReject:
    """Return the reject that a record became under a limit."""
    reject = classify_record(of, max_bytes)
    assert isinstance(reject, Reject)

    def sha256(part: bytes | None) -> bytes | None:
        return None if part is None else hashlib.sha256(part).digest()

    return SnapshotReject(
        topic_id=of.position.topic_id,
        partition=of.position.partition,
        offset=of.position.offset,
        topic=of.topic,
        record_time=of.time,
        key_sha256=sha256(of.key),
        value_sha256=sha256(of.value),
        headers_sha256=sha256(json.dumps([]).encode()),
        code=reject.code,
        faults_total=reject.total_faults,
        fault_paths=[fault.path for fault in reject.faults],
        redriven_at=STORED_AT if outcome else None,
        redrive_outcome=outcome,
        times_in_order=True,
    )


def reconcile(
    records: Sequence[Record],
    orders: Sequence[SnapshotOrder] = (),
    rejects: Sequence[SnapshotReject] = (),
    max_bytes: int = USUAL_BYTES,
    erased: Sequence[SnapshotErased] = (),
) -> tuple[list[str], dict[str, int]]:
    """Return the discrepancies, and what is not proved with its count. The topic has been recreated once."""
    end = records[-1].position.offset + 1 if records else 0
    topic = TopicState(topic=TOPIC, topic_id=TOPIC_ID, earliest={0: 0}, ends={0: end}, is_compacted=False)
    offsets = [
        StoredOffset(
            group="group", topic=TOPIC, topic_id=topic_id, partition=0, next_offset=next_offset, updated_at=STORED_AT
        )
        for topic_id, next_offset in ((TOPIC_ID, end), (OTHER_TOPIC_ID, 100))
    ]
    originals = [one.original.value_sha256 for one in orders if one.original]
    proof = Reconciliation(topic, {0: 0}, "group", offsets, rejects, originals=originals)
    for one in records:
        proof.on_record(one, classify_record(one, max_bytes))
    proof.on_stored(erased, orders, [])
    not_proved = {kind.what: kind.count for kind in proof.not_proved()}
    del not_proved["offsets of another topic or of an earlier topic id"]
    return list(map(str, proof.findings())), not_proved


NOT_READ_ORIGINALS = "originals that are not the value of a record that was read"


def test_an_original_of_an_earlier_topic_id_is_not_proved() -> None:
    before = record(0, with_unknown("o1"), topic_id=OTHER_TOPIC_ID)
    findings, not_proved = reconcile(
        [record(0, order("o2"))], [stored_order(record(0, order("o2"))), stored_order(before)]
    )
    assert findings == []
    assert not_proved == {NOT_READ_ORIGINALS: 1, "stored from another topic, or from an earlier topic id": 1}


def test_an_original_with_the_content_of_the_record_at_the_position_is_not_proved() -> None:
    """The first record with this content was in an earlier topic, or a program saved the order."""
    duplicate = record(0, with_unknown("o1", space=" "))
    stored = stored_order(duplicate, original=with_unknown("o1"))
    assert reconcile([duplicate], [stored]) == ([], {NOT_READ_ORIGINALS: 1})


def test_an_original_with_other_content_is_a_discrepancy() -> None:
    of = record(0, with_unknown("o1"))
    findings, _ = reconcile([of], [stored_order(of, original=with_unknown("o1", number=2))])
    assert "o1 [0]@0: its original is not the value of a record" in findings
    elsewhere = record(0, with_unknown("o1"), topic_id=OTHER_TOPIC_ID)
    findings, _ = reconcile([], [stored_order(elsewhere, original=with_unknown("o1", number=2))])
    assert any("its original is not the value of a record" in finding for finding in findings)


SMALL_BYTES = 3_000
ABOVE_LIMIT = "valid records above ORDERS_MAX_RECORD_BYTES that have no reject: the limit was higher"
WITHOUT_REJECT = "invalid (too_large), but not stored as a reject: it was purged or lost"


def large(uid: str, content: int = 0) -> bytes:
    return order(uid, content) + b" " * SMALL_BYTES


def test_an_order_that_was_stored_under_a_higher_limit_is_no_discrepancy() -> None:
    of = record(0, large("o1"))
    assert reconcile([of], [stored_order(of)], max_bytes=SMALL_BYTES) == ([], {ABOVE_LIMIT: 1})
    later = record(1, order("o1", 1))
    assert reconcile([of, later], [stored_order(later)], max_bytes=SMALL_BYTES) == ([], {ABOVE_LIMIT: 1})


def test_a_reject_that_was_stored_under_a_higher_limit_is_no_discrepancy() -> None:
    invalid = record(0, large("o1").replace(b'"USD"', b'"usd"'))
    assert reconcile([invalid], rejects=[stored_reject(invalid)], max_bytes=SMALL_BYTES) == ([], {})


def test_a_redrive_under_a_higher_limit_is_no_discrepancy() -> None:
    of = record(0, large("o1"))
    reject = stored_reject(of, SMALL_BYTES, outcome="stored")
    assert reconcile([of], [stored_order(of)], [reject], max_bytes=SMALL_BYTES) == ([], {})


def test_a_large_record_without_an_order_and_a_reject_is_a_discrepancy() -> None:
    before, of = record(0, order("o1", 1)), record(1, large("o1"))
    findings, _ = reconcile([of], max_bytes=SMALL_BYTES)
    assert findings == [f"o1 [0]@1: {WITHOUT_REJECT}"]
    findings, _ = reconcile([before, of], [stored_order(before)], max_bytes=SMALL_BYTES)
    assert findings == [f"o1 [0]@1: {WITHOUT_REJECT}"]
    findings, _ = reconcile([record(0, b" " * SMALL_BYTES + b"no JSON")], max_bytes=SMALL_BYTES)
    assert findings == [f"record [0]@0: {WITHOUT_REJECT}"]


def test_a_large_record_with_other_content_than_its_order_is_a_discrepancy() -> None:
    stored = stored_order(record(0, large("o1", 1)))
    findings, _ = reconcile([record(0, large("o1", 2))], [stored], max_bytes=SMALL_BYTES)
    assert findings == ["o1 [0]@0: differs from the record at its position"]


def tombstone(offset: int, uid: str) -> Record:
    return record(offset, None, key=uid.encode())


def test_a_redrive_after_a_tombstone_that_a_rewind_made_a_reject_is_no_discrepancy() -> None:
    before, erasing, again = record(0, order("o1")), tombstone(1, "o1"), record(2, large("o1"))
    rejects = [stored_reject(erasing), stored_reject(again, SMALL_BYTES, outcome="stored")]
    findings, _ = reconcile([before, erasing, again], [stored_order(again)], rejects)
    assert findings == []
    findings, _ = reconcile([before, again], [stored_order(again)], rejects[1:])
    assert findings == ["o1 [0]@2: redriven as stored, but it was so already"]


def test_a_redrive_after_a_version_that_a_rewind_made_a_reject_is_no_discrepancy() -> None:
    before, between, again = record(0, order("o1", 1)), record(1, large("o1", 2)), record(2, large("o1", 1))
    rejects = [
        stored_reject(one, SMALL_BYTES, outcome) for one, outcome in ((between, "superseded"), (again, "stored"))
    ]
    assert reconcile([before, between, again], [stored_order(again)], rejects)[0] == []


def test_a_tombstone_that_was_redriven_as_a_duplicate_of_one_that_is_a_reject_now_is_no_discrepancy() -> None:
    before, erasing, again = record(0, order("o1")), tombstone(1, "o1"), tombstone(2, "o1")
    rejects = [stored_reject(erasing), stored_reject(again, outcome="duplicate")]
    erased = [SnapshotErased(order_uid="o1", topic_id=TOPIC_ID, partition=0, offset=2)]
    assert reconcile([before, erasing, again], [], rejects, erased=erased)[0] == []
    assert reconcile([erasing, again], [], rejects, erased=erased)[0] == []
    findings, _ = reconcile([before, again], [], rejects[1:], erased=erased)
    assert findings == ["o1 [0]@2: redriven as duplicate, but its content was not stored before"]
