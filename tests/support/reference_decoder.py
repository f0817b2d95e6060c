"""A slow decoder to compare with: the JSON decoder of the standard library, then ``order_from_plain``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from orderlib import Fault, InvalidOrder, MalformedJson, Order, order_from_plain

MAX_NESTING = 100


def reference_decode(data: bytes) -> Order:
    """Return or raise what ``decode_order`` must. For MalformedJson only the class is compared."""
    try:
        text = data.decode()
        if _nesting(text) > MAX_NESTING:
            raise ValueError("too deep")
        with _higher_recursion_limit():
            plain = json.loads(text, parse_constant=_refuse, parse_int=_parse_int, parse_float=lambda _: 0.5)
    except ValueError as exc:
        raise MalformedJson([Fault(path="$", expected="JSON", found="something else")]) from exc
    return order_from_plain(plain)


def comparable(decoded: Order | InvalidOrder | MalformedJson) -> object:
    """Return the part of a result that must be equal for two decoders."""
    if isinstance(decoded, InvalidOrder):
        return decoded.faults, decoded.total
    return type(decoded) if isinstance(decoded, MalformedJson) else decoded


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse_int(digits: str) -> int:
    # Python refuses to parse 5,000 digits. Beyond 64 bits the value does not matter.
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
def _higher_recursion_limit() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 2 * MAX_NESTING)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
