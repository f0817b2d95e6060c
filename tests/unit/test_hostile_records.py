"""Records that might break the decoder. Each is accepted or refused, in little time and memory."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from random import Random

import pytest

from orderlib import InvalidOrder, MalformedJson, Order, TooLarge, decode_order
from orderlib.codecs import decode_canonical
from orderlib.ingestion.records import Record, Reject, classify_record, record_time
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE
from tests.support.fuzz_decoder import consumer_agrees, disagreements, order_or_error
from tests.support.reference_decoder import comparable, reference_decode

SAMPLE_ORDER = decode_order(SAMPLE)
RECORD = SAMPLE.strip()


def with_text(escaped: bytes) -> bytes:
    """Return the sample with this between the quotes of a name."""
    return RECORD.replace(b"Test Testov", escaped)


def with_number(number: bytes) -> bytes:
    """Return the sample with this as a known number."""
    return RECORD.replace(b'"sm_id":99', b'"sm_id":' + number)


def with_unknown(value: bytes) -> bytes:
    """Return the sample with this value in an unknown field."""
    return RECORD.replace(b'"sm_id":99', b'"sm_id":99,"later":' + value)


def with_item(item: bytes, count: int) -> bytes:
    """Return the sample with this item, repeated."""
    start = RECORD.index(b'"items":[') + len(b'"items":[')
    end = RECORD.index(b"]", start)
    return RECORD[:start] + b",".join([item] * count) + RECORD[end:]


ITEM = json.dumps(json.loads(SAMPLE)["items"][0]).encode()

MALFORMED = {
    "nothing": b"",
    "blanks": b" \t\r\n",
    "whitespace that JSON does not allow": b"\x0c" + RECORD,
    "a byte order mark": b"\xef\xbb\xbf" + RECORD,
    "UTF-16": RECORD.decode().encode("utf-16"),
    "Latin-1": with_text(b"Caf\xe9"),
    "Latin-1 in an unknown field": with_unknown(b'"Caf\xe9"'),
    "an overlong NUL": with_text(b"\xc0\x80"),
    "a surrogate in UTF-8": with_text(b"\xed\xa0\x80"),
    "past U+10FFFF": with_text(b"\xf4\x90\x80\x80"),
    "cut short": RECORD[:-1],
    "cut within a character": RECORD[: RECORD.index(b"Test")] + "é".encode()[:1],
    "two texts": RECORD + RECORD,
    "a NUL after the text": RECORD + b"\0",
    "a raw NUL": with_text(b"\0"),
    "a raw newline": with_text(b"a\nb"),
    "a raw NUL in an unknown field": with_unknown(b'"\0"'),
    "an unknown escape": with_text(rb"\x41"),
    "half an escape": with_text(rb"\ud8"),
    "single quotes": RECORD.replace(b'"', b"'"),
    "a comma at the end": RECORD[:-1] + b",}",
    "a comment": RECORD.replace(b"{", b"{/**/", 1),
    "a key that is a number": with_unknown(b"{1:1}"),
    "NaN": with_number(b"NaN"),
    "-Infinity": with_number(b"-Infinity"),
    "NaN in an unknown field": with_unknown(b"NaN"),
    "a leading zero": with_number(b"099"),
    "a leading zero in an unknown field": with_unknown(b"099"),
    "a plus sign": with_number(b"+99"),
    "a number without digits after the point": with_unknown(b"1."),
    "closed by the wrong bracket": with_unknown(b"[}"),
    "only opening brackets": b"[" * 100_000,
    "only opening braces": b'{"a":' * 100_000,
    "100,000 nested arrays in a known field": with_number(b"[" * 100_000 + b"]" * 100_000),
    "100,000 nested arrays in an unknown field": with_unknown(b"[" * 100_000 + b"]" * 100_000),
    "101 levels in a known field": with_number(b"[" * 100 + b"]" * 100),
    "101 levels in an unknown field": with_unknown(b'{"a":' * 100 + b"1" + b"}" * 100),
    "100 levels, malformed at the bottom": with_unknown(b"[" * 99 + b"01" + b"]" * 99),
    "100 levels, malformed near the top": with_unknown(b"[" * 99 + b"]" * 99 + b"]"),
    "100 levels, wrongly closed at the bottom": with_unknown(b"[" * 99 + b"}" + b"]" * 98),
    "100 levels never closed": with_unknown(b"[" * 99),
}

INVALID = {
    "null": (b"null", "$"),
    "an array": (b"[" + RECORD + b"]", "$"),
    "a string": (json.dumps(SAMPLE.decode()).encode(), "$"),
    "a number": (b"7", "$"),
    "a number of 5,000 digits": (b"7" * 5000, "$"),
    "1e400": (with_number(b"1e400"), "$.sm_id"),
    "1e-400": (with_number(b"1e-400"), "$.sm_id"),
    "5,000 digits": (with_number(b"9" * 5000), "$.sm_id"),
    "5,000 digits below nought": (with_number(b"-" + b"9" * 5000), "$.sm_id"),
    "2^63": (with_number(b"9223372036854775808"), "$.sm_id"),
    "2^64": (with_number(b"18446744073709551616"), "$.sm_id"),
    "an escaped NUL": (with_text(rb"a\u0000b"), "$.delivery.name"),
    "a lone high surrogate": (with_text(rb"\ud83d"), "$.delivery.name"),
    "a lone low surrogate": (with_text(rb"\uDE00"), "$.delivery.name"),
    "two surrogates the wrong way round": (with_text(rb"\ude00\ud83d"), "$.delivery.name"),
    "a high surrogate before an escaped letter": (with_text(rb"\ud83d\u0041"), "$.delivery.name"),
    "a newline after the currency": (RECORD.replace(b'"USD"', rb'"USD\n"'), "$.payment.currency"),
    "a newline within the currency": (RECORD.replace(b'"USD"', rb'"US\n"'), "$.payment.currency"),
    "a newline after the order_uid": (
        RECORD.replace(b'"order_uid":"b563feb7b2b84b6test"', rb'"order_uid":"b563\n"'),
        "$.order_uid",
    ),
    "year 0 by way of an offset": (
        RECORD.replace(b"2021-11-26T06:22:19Z", b"0001-01-01T00:00:00+14:00"),
        "$.date_created",
    ),
    "year 10000 by way of an offset": (
        RECORD.replace(b"2021-11-26T06:22:19Z", b"9999-12-31T23:59:59-14:00"),
        "$.date_created",
    ),
    "a time that ends in a NUL": (
        RECORD.replace(b"2021-11-26T06:22:19Z", rb"2021-11-26T06:22:19\u0000Z"),
        "$.date_created",
    ),
    "no items": (with_item(b"", 0), "$.items"),
    "1,001 items": (with_item(ITEM, 1001), "$.items"),
    "1,001 bad items": (with_item(b"7", 1001), "$.items"),
    "100 levels in a known field": (with_number(b"[" * 99 + b"]" * 99), "$.sm_id"),
    "100 levels in a known object": (with_number(b'{"a":' * 99 + b"1" + b"}" * 99), "$.sm_id"),
    "100 levels of items": (with_item(b"[" * 98 + b"]" * 98, 1), "$.items[0]"),
}

ACCEPTED = {
    "blanks around it": b" \t\r\n" + RECORD + b"\n\n",
    "100 levels in an unknown field": with_unknown(b"[" * 99 + b"]" * 99),
    "100 levels in an unknown object": with_unknown(b'{"a":' * 99 + b"1" + b"}" * 99),
    "100,000 brackets in a text": with_unknown(b'"' + b"[" * 100_000 + b'"'),
    "2,000 brackets after escaped quotes": with_unknown(rb'"\\\"' + b"[" * 2000 + rb'\\"'),
    "100,000 arrays side by side": with_unknown(b"[" + b"[]," * 100_000 + b"[]]"),
    "lone surrogates in unknown fields and keys": with_unknown(rb'{"\ud800":"\udfff\ud800\u0041"}'),
    "a lone surrogate below 100 levels": with_unknown(b"[" * 99 + rb'"\ud800"' + b"]" * 99),
    "a NUL in an unknown field": with_unknown(rb'"\u0000"'),
    "1e400 in an unknown field": with_unknown(b"1e400"),
    "5,000 digits in an unknown field": with_unknown(b"9" * 5000),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_record_that_is_not_one_json_text_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedJson) as caught:
        decode_order(data)
    assert [fault.path for fault in caught.value.faults] == ["$"]


@pytest.mark.parametrize(("data", "path"), INVALID.values(), ids=INVALID)
def test_json_that_is_not_an_order_is_invalid_in_one_place(data: bytes, path: str) -> None:
    with pytest.raises(InvalidOrder) as caught:
        decode_order(data)
    assert [fault.path for fault in caught.value.faults] == [path]


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_unusual_json_of_an_order_is_accepted(data: bytes) -> None:
    assert decode_order(data) == SAMPLE_ORDER


@pytest.mark.parametrize("data", [*MALFORMED.values(), *(data for data, _ in INVALID.values()), *ACCEPTED.values()])
def test_the_consumer_and_the_reference_agree(data: bytes) -> None:
    found = order_or_error(decode_order, data)
    assert consumer_agrees(found, data)
    assert comparable(found) == comparable(order_or_error(reference_decode, data))


def test_a_thousand_items_are_an_order() -> None:
    assert decode_order(with_item(ITEM, 1000)).items == SAMPLE_ORDER.items[:1] * 1000


@pytest.mark.parametrize("levels", [50, 100])
@pytest.mark.parametrize("with_levels", [with_unknown, with_number])
def test_the_result_does_not_depend_on_the_depth_of_the_callers_stack(
    levels: int, with_levels: Callable[[bytes], bytes]
) -> None:
    """msgspec counts its levels on the caller's stack. A deep caller must not make a valid record invalid."""
    data = with_levels(b"[" * (levels - 1) + b"]" * (levels - 1))
    asked_from_the_top = comparable(order_or_error(decode_order, data))

    def descend(levels: int) -> object:
        return descend(levels - 1) if levels else comparable(order_or_error(decode_order, data))

    levels_left = 60
    assert descend(sys.getrecursionlimit() - len(inspect.stack(0)) - levels_left) == asked_from_the_top


def keys_for_the_slowest_quicksort(count: int) -> list[bytes]:
    """Return keys in an order for which a quicksort with the median of three as pivot removes two keys a pass."""
    order = list(range(count))
    for low in range(count - 20 - count % 2, -1, -2):
        middle = (low + count - 1) // 2
        if middle >= low + 2:
            order[low], order[low + 1], order[middle] = low, order[middle], low + 1
    return [b"%06x" % key for key in order]


_SIZE = 600_000
LARGE = {
    "one long known text": with_text(b"a" * _SIZE),
    "one long known text in Cyrillic": with_text("ж".encode() * (_SIZE // 2)),
    "one long unknown text": with_unknown(b'"' + b"a" * _SIZE + b'"'),
    "a long text below 100 levels": with_unknown(b"[" * 99 + b'"' + b"a" * _SIZE + b'"' + b"]" * 99),
    "escapes below 100 levels": with_unknown(b"[" * 99 + b'"' + rb"\n" * (_SIZE // 2) + b'"' + b"]" * 99),
    "a text that never ends below 101 levels": b"[" * 101 + b'"' + b"a" * _SIZE,
    "quotes below 101 levels": b"[" * 101 + b'"' * _SIZE,
    "escapes and many brackets": with_unknown(b'["' + rb"\n" * (_SIZE // 2) + b'"' + b",[]" * 1000 + b"]"),
    "lone surrogates": with_unknown(b'"' + rb"\ud800" * (_SIZE // 6) + b'"'),
    "other escapes behind a lone surrogate": with_unknown(b'"' + rb"\ud800" + rb"\u0041" * (_SIZE // 6) + b'"'),
    "chains of 100 levels and a lone surrogate": with_unknown(
        b"[" + (b"[" * 98 + b"]" * 98 + b",") * (_SIZE // 197) + rb'"\ud800"]'
    ),
    "texts in arrays": with_unknown(b"[" + b'["["],' * (_SIZE // 6) + b"0]"),
    "brackets": with_unknown(b"[" + b"[]," * (_SIZE // 3) + b"0]"),
    "only opening brackets": b"[" * _SIZE,
    "digits": with_number(b"9" * _SIZE),
    "digits after a point": with_number(b"1." + b"9" * _SIZE),
    "items of one digit": with_item(b"0", _SIZE // 2),
    "empty items": with_item(b"{}", _SIZE // 3),
    "one key over and over": b"{" + b'"sm_id":"x",' * (_SIZE // 12) + b'"sm_id":"x"}',
    "unknown keys": b"{" + b",".join(b'"%x":1' % key for key in range(_SIZE // 10)) + b"}",
    "unknown keys of an order": RECORD[:-1] + b"".join(b',"%x":1' % key for key in range(_SIZE // 10)) + b"}",
    "unknown keys that are slow to sort": RECORD[:-1]
    + b"".join(b',"%b":1' % key for key in keys_for_the_slowest_quicksort(150_000))
    + b"}",
    "the same unknown key over and over": RECORD[:-1] + b',"x":1' * (_SIZE // 6) + b"}",
    "items with unknown fields": with_item(ITEM[:-1] + b',"later":' + b"[9," * 98 + b"9" + b"]" * 98 + b"}", 1000),
    "blanks": b" " * _SIZE,
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("decode", [decode_order, decode_canonical])
def test_a_large_record_is_decoded_in_little_time_and_memory(decode: Callable[[bytes], Order], name: str) -> None:
    data = LARGE[name]
    # The report is in document order, so the validation collects the keys of an object, also the unknown ones.
    times = 25 if "unknown keys" in name else 8
    tracemalloc.start()
    began = time.perf_counter()
    try:
        order_or_error(decode, data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < times * len(data)
    # Far more than a slow machine needs under tracemalloc. It must not take minutes.
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("value", [b"[" * 10_000_000, b"\xff" * 10_000_000])
def test_a_value_above_the_limit_is_not_parsed(value: bytes) -> None:
    reject = classify_record(record(value), max_bytes=8 * 1024 * 1024)
    assert isinstance(reject, Reject)
    assert reject.code == TooLarge.code
    assert [str(fault) for fault in reject.faults] == ["$: expected at most 8,388,608 bytes, found 10,000,000 bytes"]


def test_a_record_without_a_value_is_malformed() -> None:
    reject = classify_record(record(None), max_bytes=100)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.total_faults) == ("malformed_json", 1)


def record(value: bytes | None) -> Record:
    """Return a record with this value."""
    position = RecordPosition(topic_id="topic", partition=0, offset=0)
    return Record(position=position, time=record_time(0), topic="orders", key=None, value=value)


def test_a_short_fuzzing_run_finds_no_disagreement_with_the_reference() -> None:
    """Longer runs, ``python -m tests.support.fuzz_decoder``, found some of the cases above."""
    tried = list(itertools.islice(disagreements(Random(20211126)), 1500))
    assert [data for data in tried if data is not None] == []
