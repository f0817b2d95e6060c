"""A slow second opinion about what an order is: the standard library's JSON, then the contract on plain data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from orderlib import Fault, InvalidOrder, MalformedJson, Order, order_from_plain

MAX_NESTING = 100


def reference_decode(data: bytes) -> Order:
    """What ``decode_order`` must give or raise; of MalformedJson only the class counts."""
    try:
        text = data.decode()
        if _nesting(text) > MAX_NESTING:
            raise ValueError("too deep")
        with _room_for_recursion():
            plain = json.loads(text, parse_constant=_refuse, parse_int=_parse_int, parse_float=lambda _: 0.5)
    except ValueError as exc:
        raise MalformedJson([Fault(path="$", expected="JSON", found="something else")]) from exc
    return order_from_plain(plain)


def verdict(decoded: Order | InvalidOrder | MalformedJson) -> object:
    """What two decoders must agree about."""
    if isinstance(decoded, InvalidOrder):
        return decoded.faults, decoded.total
    return type(decoded) if isinstance(decoded, MalformedJson) else decoded


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse_int(digits: str) -> int:
    # Python reads no integer of 5,000 digits; where it ends does not matter past 64 bits.
    return int(digits) if len(digits) < 40 else int(digits[:40])


def _nesting(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


@contextmanager
def _room_for_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 2 * MAX_NESTING)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
