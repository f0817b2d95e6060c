"""A slow decoder to compare with: the JSON decoder of the standard library, then ``order_from_plain``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import attrs
import msgspec

from orderlib import Delivery, Fault, InvalidOrder, Item, MalformedJson, Order, Payment, order_from_plain

MAX_NESTING = 100

_UNREADABLE = re.compile("[\0\ud800-\udfff]")


def reference_decode(data: bytes) -> Order:
    """Return or raise what ``decode_order`` must. For MalformedJson only the class is compared."""
    try:
        text = data.decode()
        if _nesting(text) > MAX_NESTING:
            raise ValueError("too deep")
        plain = _loads(text)
    except ValueError as exc:
        raise MalformedJson([Fault(path="$", expected="JSON", found="something else")]) from exc
    return order_from_plain(plain)


def reference_unknown_fields(data: bytes) -> dict[str, dict[str, object]]:
    """Return the unknown fields of a text that is an order: by the path of their object and by name."""
    plain = _loads(data.decode())
    objects = {
        "$": (plain, Order),
        "$.delivery": (plain["delivery"], Delivery),
        "$.payment": (plain["payment"], Payment),
    }
    objects |= {f"$.items[{index}]": (item, Item) for index, item in enumerate(plain["items"])}
    unknown = {
        path: {
            name: value for name, value in found.items() if name not in {field.name for field in attrs.fields(model)}
        }
        for path, (found, model) in objects.items()
    }
    return {path: fields for path, fields in unknown.items() if fields}


def as_readable(fields: object) -> object:
    """Return fields with the texts that ``unknown_fields`` has: U+0000 and four digits for a forbidden character."""
    return _with_texts(fields, lambda text: _UNREADABLE.sub(lambda found: f"\0{ord(found[0]):04x}", text))


def from_readable(fields: Mapping[str, msgspec.Raw]) -> object:
    """Parse fields that ``unknown_fields`` returned. The digits after U+0000 may have been upper case."""
    parsed = {name: _loads(bytes(value).decode()) for name, value in fields.items()}
    return _with_texts(parsed, lambda text: re.sub(r"\0....", lambda found: found[0].lower(), text))


def _with_texts(value: object, change: Callable[[str], str]) -> object:
    match value:
        case str():
            return change(value)
        case list():
            return [_with_texts(part, change) for part in value]
        case dict():
            return {_with_texts(name, change): _with_texts(part, change) for name, part in value.items()}
        case _:
            return value


def _loads(text: str) -> Any:
    with _higher_recursion_limit():
        return json.loads(text, parse_constant=_refuse, parse_int=_parse_int, parse_float=lambda _: 0.5)


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
