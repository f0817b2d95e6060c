"""JSON to orders and back; plain data to orders and back.

Decoding is one pass of msgspec in C. Only where that fails, or meets one of the few things it cannot judge, a second
look goes through the record again, finds every fault, and decides alone.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from cattrs import BaseConverter
from msgspec.inspect import DataclassType, Type, VarTupleType

from orderlib.canonical import Canonical, CanonicalOrder, canonical_form
from orderlib.contract import M, Validator, rules_of
from orderlib.errors import Fault, MalformedJson
from orderlib.models import MAX_ITEMS, Delivery, Item, Order, Payment

#: More levels of arrays and objects than this, anywhere in a record, are malformed.
MAX_NESTING = 100

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Order)
_canonical_decoder = msgspec.json.Decoder(CanonicalOrder)


def decode_order(data: bytes) -> Order:
    """The order in a JSON text.

    * Types are strict: ``"99"``, ``1.0`` and ``true`` are not integers; null is never a value.
    * Unknown fields are ignored, with any content, so that senders may add fields first.
    * Of a repeated key the last counts.

    Raises:
        MalformedJson: not one well-formed JSON text in UTF-8, or more than 100 levels deep.
        InvalidOrder: well-formed, but not an order; ``faults`` has every fault in document order.
        TypeError: anything but bytes.
    """
    return _decoded(data, _decoder)


def decode_canonical(data: bytes) -> Canonical:
    """What ``decode_order`` gives, in canonical form; takes and refuses the same."""
    canonical = _decoded(data, _canonical_decoder)
    canonical.date_created = canonical.date_created.astimezone(dt.UTC)
    return canonical


def _decoded(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    if not isinstance(data, bytes):
        raise TypeError(f"an order is decoded from bytes, not from {type(data).__name__}")
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise _malformed(f"bytes that are not UTF-8 (byte {exc.start})") from exc
    if (
        # Each level has two brackets; a text that is too short for them is not worth counting.
        len(data) > 2 * MAX_NESTING
        and data.count(b"[") + data.count(b"{") > MAX_NESTING
        and _nesting(data) > MAX_NESTING
    ):
        raise _malformed(f"more than {MAX_NESTING:,} levels of nesting")
    try:
        order: Any = decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        order = None
    if order is None or (b"\\" in data and b"\\u0000" in data) or not 1 < order.date_created.year < 9999:
        return msgspec.convert(_full_report(data), decoder.type)
    return order  # type: ignore[no-any-return]


def encode_order(order: Order) -> bytes:
    """The canonical JSON of an order: fields in the contract's order, no blanks, UTF-8, the time in UTC with ``Z``.

    Equal orders give equal bytes, and ``decode_order`` gives the order back.
    """
    return _encoder.encode(canonical_form(order))


def content_sha256(order: Order) -> bytes:
    """The SHA-256 of an order's canonical JSON, 32 bytes: equal exactly where the content is."""
    return digest(canonical_form(order))


def order_from_plain(data: object) -> Order:
    """The order in plain data (mappings, lists, strings, integers; the time as text or as an aware datetime).

    Nothing is coerced, and unknown keys are passed over.
    Raises InvalidOrder with the same faults as ``decode_order`` for the same content.
    """
    return _structure(data, Order)


def order_to_plain(order: Order) -> dict[str, Any]:
    """An order as plain data of JSON's types, in the contract's order, the time in UTC as RFC 3339 text.

    ``order_from_plain`` gives the order back.
    """
    plain: dict[str, Any] = msgspec.to_builtins(canonical_form(order))
    return plain


def register_order_hooks(converter: BaseConverter) -> None:
    """Teach a cattrs converter of yours the models, by the rules of ``order_from_plain`` and ``order_to_plain``.

    cattrs by itself calls the type and so turns ``"12"`` into 12; with these hooks nothing is coerced. Structuring a
    model raises InvalidOrder, its paths beginning at that model; inside a class of yours, cattrs wraps it in its own.
    """
    for model in (Order, Delivery, Payment, Item):
        converter.register_structure_hook(model, _structure)
    converter.register_unstructure_hook(Order, order_to_plain)


def digest(canonical: Canonical) -> bytes:
    """``content_sha256`` of an order in canonical form."""
    return hashlib.sha256(_encoder.encode(canonical)).digest()


def _structure(data: object, cls: type[M]) -> M:
    validator = Validator()
    plain = validator.validate(data, rules_of(cls), "$")
    validator.raise_faults()
    return msgspec.convert(plain, cls)


def _full_report(data: bytes) -> object:
    """The order in a JSON text as plain data, or every fault."""
    try:
        return _look(data)
    except RecursionError:
        # msgspec takes a level of the caller's stack for each level of the text. A new thread has all of them.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_look, data).result()


def _look(data: bytes) -> object:
    try:
        return _examined(data)
    except msgspec.DecodeError:
        # msgspec refuses a lone surrogate in an escape as malformed, also in unknown fields; JSON's grammar allows it.
        # As U+0000 it stays as unfit for a text of ours, and nobody looks at the others.
        try:
            return _examined(_without_lone_surrogates(data))
        except msgspec.DecodeError as exc:
            raise _malformed(str(exc).removeprefix("JSON is malformed: ")) from exc


def _examined(data: bytes) -> object:
    validator = Validator(open_lazily=_open_lazily)
    plain = validator.validate(msgspec.json.decode(data, type=msgspec.Raw), rules_of(Order), "$")
    validator.raise_faults()
    return plain


#: A high surrogate that no low one follows, or a low one that follows no high one. No backslash before it is escaped.
_LONE_SURROGATE = re.compile(
    r"""\\u[dD] (?: [89abAB][0-9a-fA-F]{2} (?! \\u[dD][c-fC-F][0-9a-fA-F]{2} )
                  | (?<! \\u[dD][89abAB][0-9a-fA-F]{2} \\u[dD] ) [c-fC-F][0-9a-fA-F]{2} )""",
    re.VERBOSE,
)


def _without_lone_surrogates(data: bytes) -> bytes:
    """Return the text with U+0000 instead of each. Raise MalformedJson for a text with a raw NUL."""
    if b"\0" in data:
        raise _malformed("a control character")
    # A NUL stands for an escaped backslash meanwhile, so that every other backslash begins an escape. Each replacement
    # costs ten times less memory in a str than in bytes.
    text = data.replace(rb"\\", b"\0").decode("latin-1")
    return _LONE_SURROGATE.sub(r"\\u0000", text).encode("latin-1").replace(b"\0", rb"\\")


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
#: Opens an array up to one element past the limit, and passes over the rest without keeping it.
_ARRAY = msgspec.json.Decoder(
    msgspec.defstruct(
        "_Array", [(f"at_{i}", msgspec.Raw, msgspec.Raw()) for i in range(MAX_ITEMS + 1)], array_like=True
    )
)


def _open_lazily(value: object, rule: Type) -> object:
    """Open a raw JSON value as far as its rule asks; of any other kind give a stand-in of that kind."""
    data = bytes(value)  # type: ignore[call-overload]
    match data[:1]:
        case b"{":
            return _OBJECT.decode(data) if isinstance(rule, DataclassType) else {}
        case b"[":
            if not isinstance(rule, VarTupleType):
                return []
            opened = msgspec.structs.astuple(_ARRAY.decode(data))
            return list(itertools.takewhile(len, map(bytes, opened)))
        case b'"':
            return _TEXT.decode(data)
        case b"t" | b"f":
            return data == b"true"
        case b"n":
            return None
    if any(mark in data for mark in (b".", b"e", b"E")):
        return 0.5
    # Past 20 characters it is out of bounds whatever its digits are; Python refuses to read 5,000 of them.
    return int(data) if len(data) <= 20 else int(data[:20]) * 10


_NEITHER_BRACKETS_NOR_QUOTES = bytes(set(range(256)) - set(b'[]{}"'))
_ROUND = bytes.maketrans(b"[]{}", b"()()")
_RUN = re.compile(rb"\(+|\)+")
_CHUNK_BYTES = 64 * 1024


def _nesting(data: bytes) -> int:
    """Return how many levels a text nests; exact for JSON, near enough for anything else."""
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = _outside_strings(unescaped.translate(_ROUND, _NEITHER_BRACKETS_NOR_QUOTES))
    levels = 0
    # Remove the innermost pairs, level by level, as long as they are many. Then there are few runs.
    while len(fewer := brackets.replace(b"()", b"")) < 0.9 * len(brackets):
        brackets, levels = fewer, levels + 1
    runs = (
        run.end() - run.start() if run[0][0] == ord("(") else run.start() - run.end() for run in _RUN.finditer(brackets)
    )
    return levels + max(itertools.accumulate(runs), default=0)


def _outside_strings(text: bytes) -> bytes:
    """Return what stands outside of quotes; in chunks, since each part costs far more memory than its length."""
    outside, inside = [], 0
    for start in range(0, len(text), _CHUNK_BYTES):
        parts = text[start : start + _CHUNK_BYTES].split(b'"')
        outside.append(b"".join(parts[inside::2]))
        inside ^= (len(parts) - 1) & 1
    return b"".join(outside)


def _malformed(found: str) -> MalformedJson:
    return MalformedJson([Fault(path="$", expected="one JSON text in UTF-8", found=found)])
