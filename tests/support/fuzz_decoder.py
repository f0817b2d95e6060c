"""Mutation fuzzing of the decoder against the reference: ``python -m tests.support.fuzz_decoder --seconds 600``.

For any input ``decode_order`` and ``decode_canonical`` return an order or raise RejectedError, as the reference does.
An input with a new result is added to the corpus. The first disagreement prints the input and ends the run with 1.
Add this input to the cases of tests/unit/test_hostile_records.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator, Iterator
from random import Random

import attrs

from orderlib import InvalidOrder, MalformedJson, Order, content_sha256, decode_order, encode_order
from orderlib.codecs import decode_canonical, digest, unknown_fields
from orderlib.testing import SAMPLE, FaultKind, break_order
from tests.support.reference_decoder import (
    as_readable,
    comparable,
    from_readable,
    reference_decode,
    reference_unknown_fields,
)

_TOKENS = [
    *(bytes([byte]) for byte in b'"\\[]{},: \t\n\r\0\x1f0-+.eE\x7f\x80\xc3\xed\xff'),
    *rb"\u0000 \ud800 \udc00 \ud83d\ude00 \u00e9 \" \\ \/ \b \x41 \u12 \uD8".split(),
    *b"null true false NaN Infinity -0 01 1. .5 1e400 1E+2 9223372036854775807 9223372036854775808".split(),
    *b'"" "." ".." "x" "99" [] {} [[ ]] }} ,, "order_uid":"a", "sm_id":7, "items":[{}], "delivery":{}, "x":'.split(),
    rb'"order\u005fuid":"b",',
    b'"2021-11-26T06:22:19+05:30"',
    b'"0001-01-01T00:00:00+14:00"',
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"[" * 50 + b"]" * 50,
    b"[" * 98,
    b"]" * 98,
    b'{"a":' * 100,
    "é\U0001f600\u2028".encode(),
]


def inputs(rng: Random) -> Generator[bytes, bool, None]:
    """Yield inputs without end. Send back whether an input is worth more mutations."""
    order = decode_order(SAMPLE)
    everywhere = attrs.evolve(
        order,
        locale="\U0001f600é\u0001",
        sm_id=2**63 - 1,
        delivery=attrs.evolve(order.delivery, address="\\\"[{'"),
    )
    corpus = [SAMPLE, encode_order(order), encode_order(everywhere)]
    while True:
        if rng.random() < 0.2:
            data = break_order(rng.choice([order, everywhere]), rng.choice(list(FaultKind)), rng).data
        else:
            data = rng.choice(corpus)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            data = rng.choice(_MUTATIONS)(data, rng.choice(corpus), rng)
        if (yield data) and len(data) < 20_000:
            corpus.append(data)


def _cut(data: bytes, _other: bytes, rng: Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, _other: bytes, rng: Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:end] + data[start:end] * rng.choice([1, 2, 30]) + data[end:]


def _splice(data: bytes, other: bytes, rng: Random) -> bytes:
    (start, end), (other_start, other_end) = _slice(data, rng), _slice(other, rng)
    return data[:start] + other[other_start:other_end] + data[end:]


def _insert(data: bytes, _other: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_TOKENS) + data[at:]


def _replace_value(data: bytes, _other: bytes, rng: Random) -> bytes:
    """Replace the text after one of the colons."""
    colons = [at for at, byte in enumerate(data) if byte == ord(":")]
    if not colons:
        return data
    start = rng.choice(colons) + 1
    end = min((at for at in (data.find(mark, start) for mark in (b",", b"}")) if at >= 0), default=len(data))
    return data[:start] + rng.choice(_TOKENS) + data[end:]


def _flip(data: bytes, _other: bytes, rng: Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _bury(data: bytes, _other: bytes, rng: Random) -> bytes:
    """Add an unknown field with a token at the bottom of many levels."""
    levels = rng.choice([1, 50, 97, 98, 99, 100])
    at = data.find(b"{", rng.randrange(len(data) + 1)) + 1
    return data[:at] + b'"x":' + b"[" * levels + rng.choice(_TOKENS) + b"]" * levels + b"," + data[at:]


_MUTATIONS: list[Callable[[bytes, bytes, Random], bytes]] = [
    _cut,
    _repeat,
    _splice,
    _insert,
    _insert,
    _replace_value,
    _replace_value,
    _flip,
    _bury,
]


def _slice(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 2, 8, 40, 400]))


def order_or_error(decode: Callable[[bytes], Order], data: bytes) -> Order | InvalidOrder | MalformedJson:
    """Return the order, or the error of the decoder. Any other exception ends the run."""
    try:
        return decode(data)
    except (InvalidOrder, MalformedJson) as error:
        return error


def consumer_agrees(found: Order | InvalidOrder | MalformedJson, data: bytes) -> bool:
    """Return whether the consumer decodes the same fields, unknown ones too, or raises an equal error."""
    try:
        canonical, unknown = decode_canonical(data)
    except (InvalidOrder, MalformedJson) as error:
        return comparable(error) == comparable(found)
    expected = reference_unknown_fields(data)
    named = {path: from_readable(fields) for path, fields in unknown_fields(data).items()}
    return (
        isinstance(found, Order)
        and digest(canonical) == content_sha256(found)
        and bool(unknown) == bool(expected)
        and named == {path: as_readable(fields) for path, fields in expected.items()}
    )


def disagreements(rng: Random) -> Iterator[bytes | None]:
    """Try inputs without end. Yield the inputs about which decoders and reference differ, ``None`` for the others."""
    seen: set[object] = set()
    stream = inputs(rng)
    data = next(stream)
    while True:
        found = order_or_error(decode_order, data)
        is_agreed = consumer_agrees(found, data) and comparable(found) == comparable(
            order_or_error(reference_decode, data)
        )
        yield None if is_agreed else data
        kind: object = Order
        if isinstance(found, MalformedJson | InvalidOrder):
            kind = tuple((fault.path, fault.found.partition(" (byte ")[0]) for fault in found.faults[:2])
        is_new = kind not in seen
        seen.add(kind)
        data = stream.send(is_new)


def main() -> int:
    """Fuzz until the time is over or a disagreement is found."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz_decoder", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    deadline = time.monotonic() + arguments.seconds
    for tried, culprit in enumerate(disagreements(Random(arguments.seed)), start=1):
        if culprit is not None:
            print(f"after {tried:,} inputs decoders and reference differ about {culprit!r}")
            return 1
        if time.monotonic() > deadline:
            print(f"{tried:,} inputs, no disagreement")
            return 0
    raise AssertionError("inputs never end")


if __name__ == "__main__":
    sys.exit(main())
