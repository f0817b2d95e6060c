"""Invalid orders, by kind of fault.

They are derived from the rules on the models. Each is a valid order with one fault added, so its fault report has one
path. The sender's ``--bad-rate`` sends them.
"""

from __future__ import annotations

import enum
import itertools
import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

import attrs
import msgspec
from msgspec.inspect import DataclassType, DateTimeType, IntType, StrType, Type, VarTupleType

from orderlib.codecs import MAX_NESTING, encode_order, order_to_plain
from orderlib.contract import rule_of, rules_of
from orderlib.errors import InvalidOrder, MalformedJson, RejectedError
from orderlib.models import Order


class FaultKind(enum.StrEnum):
    """One way in which an order can be invalid."""

    # A fault of one value: the report has its path.
    #: A field is absent.
    MISSING = "missing"
    #: A value is null.
    NULL = "null"
    #: A value has another JSON type.
    WRONG_TYPE = "wrong_type"
    #: A text is shorter than its minimum.
    TOO_SHORT = "too_short"
    #: A text is longer than its maximum.
    TOO_LONG = "too_long"
    #: A text does not match its pattern, or a time is not RFC 3339.
    OTHER_FORM = "other_form"
    #: A text contains U+0000.
    NUL_CHARACTER = "nul_character"
    #: A text contains a lone surrogate.
    LONE_SURROGATE = "lone_surrogate"
    #: An integer is less than its minimum.
    TOO_SMALL = "too_small"
    #: An integer is greater than its maximum.
    TOO_GREAT = "too_great"
    #: An integer has 5,000 digits.
    MANY_DIGITS = "many_digits"
    #: A number has an exponent that no float has.
    HUGE_FLOAT = "huge_float"
    #: A time has no offset.
    WITHOUT_OFFSET = "without_offset"
    #: The UTC instant of a time is outside the years 0001 to 9999.
    OUT_OF_YEARS = "out_of_years"
    #: The order has no items.
    NO_ITEMS = "no_items"
    #: The order has more than 1,000 items.
    TOO_MANY_ITEMS = "too_many_items"
    # A fault of the record itself: the path is ``$``.
    #: The JSON is not an object.
    NOT_AN_OBJECT = "not_an_object"
    #: The bytes are not UTF-8.
    NOT_UTF8 = "not_utf8"
    #: The JSON begins with a byte order mark.
    BYTE_ORDER_MARK = "byte_order_mark"
    #: There is no JSON at all.
    EMPTY = "empty"
    #: The end of the JSON is missing.
    TRUNCATED = "truncated"
    #: Something follows the JSON.
    TWO_TEXTS = "two_texts"
    #: A text contains an unescaped control character.
    RAW_CONTROL_CHARACTER = "raw_control_character"
    #: A number is not valid JSON, such as NaN or 01.
    NOT_A_NUMBER = "not_a_number"
    #: The JSON has more than 100 levels of nesting.
    TOO_DEEP = "too_deep"


@attrs.frozen(kw_only=True)
class BadRecord:
    """A record value that must be rejected."""

    #: The value of the record.
    data: bytes = attrs.field(repr=False)
    #: The JSON path of its only fault.
    path: str
    #: The error that ``decode_order`` raises for it.
    error: type[RejectedError]


@attrs.frozen
class _Place:
    """A value in the plain data of an order, with its rule."""

    container: Any = attrs.field(repr=False)
    key: str | int
    rule: Type
    path: str
    is_required: bool = True

    @property
    def value(self) -> Any:
        return self.container[self.key]


def break_order(order: Order, kind: FaultKind, rng: Random) -> BadRecord:
    """Return the JSON of an order with one fault of this kind. ``rng`` chooses the place and the bad value."""
    plain = order_to_plain(order)
    bad_text = _bad_text(encode_order(order), kind, rng)
    if bad_text is not None:
        error = InvalidOrder if kind is FaultKind.NOT_AN_OBJECT else MalformedJson
        return BadRecord(data=bad_text, path="$", error=error)
    malformed = kind in {FaultKind.NOT_A_NUMBER, FaultKind.TOO_DEEP, FaultKind.RAW_CONTROL_CHARACTER}
    places = list(_places(plain, rules_of(Order), "$"))
    rng.shuffle(places)
    for place in places:
        if kind is FaultKind.MISSING:
            if not isinstance(place.key, str) or not place.is_required:
                continue
            del place.container[place.key]
        else:
            bad_value = _bad_value(place.rule, place.value, kind, rng)
            if bad_value is None:
                continue
            place.container[place.key] = msgspec.Raw(bad_value)
        path, error = ("$", MalformedJson) if malformed else (place.path, InvalidOrder)
        return BadRecord(data=msgspec.json.encode(plain), path=path, error=error)
    raise AssertionError(f"no value of an order can have a fault of kind {kind}")


def _places(container: Any, rule: DataclassType, path: str) -> Iterator[_Place]:
    for field in rule.fields:
        if not field.required:
            # Canonical JSON omits a default.
            container.setdefault(field.name, field.default)
        place = _Place(container, field.name, rule_of(field), f"{path}.{field.name}", field.required)
        yield place
        match place.rule:
            case DataclassType():
                yield from _places(place.value, place.rule, place.path)
            case VarTupleType(item_type=DataclassType() as item_rule):
                for index, item in enumerate(place.value):
                    yield _Place(place.value, index, item_rule, f"{place.path}[{index}]")
                    yield from _places(item, item_rule, f"{place.path}[{index}]")


def _bad_value(rule: Type, good: Any, kind: FaultKind, rng: Random) -> bytes | None:
    """Return the JSON of a value that breaks a rule in this way, made from a valid one; ``None`` if no value can."""
    match kind, rule:
        case FaultKind.NULL, _:
            return b"null"
        case FaultKind.WRONG_TYPE, _:
            return rng.choice([value for accepted, value in _OF_EVERY_TYPE if not isinstance(rule, accepted)])
        case FaultKind.NOT_A_NUMBER, _:
            return rng.choice([b"NaN", b"Infinity", b"-Infinity", b"nan", b"01", b"+1", b".5", b"0x10"])
        case FaultKind.TOO_DEEP, _:
            # These levels are too deep even without those of the order around them.
            return b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1)
        case (FaultKind.TOO_SHORT, StrType(min_length=int(minimum))) if minimum > 0:
            return _text(good[: minimum - 1])
        case FaultKind.TOO_LONG, StrType(max_length=int(maximum)):
            return _text("".join(itertools.islice(itertools.cycle(good or "x"), maximum + 1)))
        case FaultKind.OTHER_FORM, StrType(pattern=str(pattern)):
            return _text(rng.choice([text for text in _variants(good) if re.search(pattern, text) is None]))
        case FaultKind.OTHER_FORM, DateTimeType():
            return _text(
                rng.choice(["", "yesterday", "1637907739", good[:10], f"0{good}", f"{good}\n", "2021-02-30T00:00:00Z"])
            )
        case FaultKind.NUL_CHARACTER, StrType() | DateTimeType():
            return _text(_with_character(good, "\0", rng))
        case FaultKind.LONE_SURROGATE, StrType() | DateTimeType():
            return _text(_with_character(good, rng.choice("\ud800\udbff\udc00\udfff"), rng))
        case FaultKind.RAW_CONTROL_CHARACTER, StrType():
            return _text(good)[:-1] + bytes([rng.randrange(32)]) + b'"'
        case FaultKind.TOO_SMALL, IntType(ge=int(minimum)):
            return str(rng.choice([minimum - 1, -(2**63), -(2**63) - 1, -(2**64)])).encode()
        case FaultKind.TOO_GREAT, IntType(le=int(maximum)):
            return str(rng.choice([maximum + 1, 2**63, 2**64 - 1, 2**64, 10**20])).encode()
        case FaultKind.MANY_DIGITS, IntType():
            return rng.choice([b"", b"-"]) + b"9" * 5000
        case FaultKind.HUGE_FLOAT, IntType():
            return rng.choice([b"1e400", b"-1e400", b"1e-400"])
        case FaultKind.WITHOUT_OFFSET, DateTimeType():
            return _text(good.removesuffix("Z"))
        case FaultKind.OUT_OF_YEARS, DateTimeType():
            return _text(rng.choice(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-00:01"]))
        case FaultKind.NO_ITEMS, VarTupleType():
            return b"[]"
        case FaultKind.TOO_MANY_ITEMS, VarTupleType(max_length=int(maximum)):
            return msgspec.json.encode((good * (maximum + 1))[: maximum + 1])
        case _:
            return None


def _bad_text(data: bytes, kind: FaultKind, rng: Random) -> bytes | None:
    """Return a record that is itself bad in this way; ``None`` for a fault of one value."""
    match kind:
        case FaultKind.NOT_AN_OBJECT:
            return rng.choice(
                [b"[%b]" % data, json.dumps(data.decode()).encode(), b"[]", b'""', b"7", b"true", b"null"]
            )
        case FaultKind.NOT_UTF8:
            at = rng.randrange(len(data))
            bad = rng.choice([b"\xff", b"\x80", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
            return data[:at] + bad + data[at:]
        case FaultKind.BYTE_ORDER_MARK:
            return b"\xef\xbb\xbf" + data
        case FaultKind.EMPTY:
            return rng.choice([b"", b" ", b"\n"])
        case FaultKind.TRUNCATED:
            return data[: rng.randrange(1, len(data))]
        case FaultKind.TWO_TEXTS:
            return data + rng.choice([data, b"}", b"{}", b",", b"\0", b"null"])
        case _:
            return None


#: The rules that accept a type, and JSON of that type.
_OF_EVERY_TYPE: list[tuple[Any, bytes]] = [
    (IntType, b"1"),
    ((), b"1.0"),
    ((), b"1.5e3"),
    ((), b"true"),
    ((), b"false"),
    ((StrType, DateTimeType), b'"99"'),
    (VarTupleType, b"[]"),
    (DataclassType, b"{}"),
]


def _text(text: str) -> bytes:
    # The standard library writes lone surrogates as escapes; msgspec does not write them at all.
    return json.dumps(text).encode()


def _with_character(good: str, character: str, rng: Random) -> str:
    """Return the text with one character replaced, so that its length stays valid."""
    at = rng.randrange(max(len(good), 1))
    return good[:at] + character + good[at + 1 :]


def _variants(good: str) -> Iterator[str]:
    """Yield texts of the same length as a valid one that differ in one character."""
    for character in ("\n", " ", "/", "%", "a", "é", "\N{FULLWIDTH DIGIT ONE}"):
        yield good[:-1] + character
        yield character + good[1:]
