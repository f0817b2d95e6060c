"""Orders as JSON and as plain data, and the content digest.

Decoding is strict, and an error reports every fault of a record.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import itertools
import operator
import re
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar

import attrs
import msgspec
from cattrs import BaseConverter
from msgspec.inspect import DataclassType, Type, VarTupleType

from orderlib.contract import (
    M,
    Validator,
    defaults_of,
    model_of,
    model_schemas,
    repr_without_values,
    rule_of,
    rules_of,
)
from orderlib.errors import Fault, MalformedJson, RejectedError
from orderlib.models import MAX_ITEMS, Delivery, Item, Order, Payment

# msgspec decodes an order in one pass in C. It stops at the first fault, and it cannot check every rule. If it fails,
# or if a rule is left to check, `_full_report` validates the record again, finds every fault, and decides.
#
# The consumer's decoder also stops at the first unknown field. So a record without unknown fields costs nothing more.
# Other records are decoded again without that rule, and `unknown_fields` opens the objects of the order one by one.
#
# Canonical JSON is encoded from structs with the fields and rules of the models. msgspec would encode a model's fields
# sorted by name: it follows the slots of a class, and CPython sorts slots. The consumer decodes records straight into
# structs, which takes two thirds of the time.

#: A record with more levels of arrays and objects than this is malformed.
MAX_NESTING = 100


class CanonicalOrder(Protocol):
    """An order as a struct, with its time in UTC. msgspec encodes it as canonical JSON.

    The struct has every field of ``Order``. Listed here are only those that orderlib reads by name.
    """

    order_uid: str
    date_created: dt.datetime
    delivery: object
    payment: object
    items: Sequence[object]


class _HasTime(Protocol):
    @property
    def date_created(self) -> dt.datetime: ...


T = TypeVar("T")

#: Fields, each with its model, that are treated as unknown.
HiddenFields: TypeAlias = "frozenset[tuple[Hashable, str]]"


@functools.cache
def _struct(model: type[attrs.AttrsInstance]) -> Any:
    """Return the struct class of a model; ``Any``, because a type checker cannot know a class made at run time."""
    hints = typing.get_type_hints(model, include_extras=True)
    fields = [(field.name, _with_structs(hints[field.name]), field.default) for field in rules_of(model).fields]
    return msgspec.defstruct(
        f"Canonical{model.__name__}",
        fields,
        namespace={"__repr__": repr_without_values},
        gc=False,
        forbid_unknown_fields=True,
        omit_defaults=True,
    )


def _with_structs(hint: Any) -> Any:
    """Return a type with structs in place of models."""
    if attrs.has(hint):
        return _struct(hint)
    if typing.get_origin(hint) is Annotated:
        plain, *rules = typing.get_args(hint)
        return Annotated[_with_structs(plain), *rules]
    if typing.get_origin(hint) is tuple:
        item = _with_structs(typing.get_args(hint)[0])
        return tuple[item, ...]  # type: ignore[valid-type]  # a type that is made at run time
    return hint


def _names(model: type[attrs.AttrsInstance]) -> list[str]:
    return [field.name for field in attrs.fields(model)]


_OrderStruct = _struct(Order)
_DeliveryStruct = _struct(Delivery)
_PaymentStruct = _struct(Payment)
_ItemStruct = _struct(Item)

_PARTS: tuple[tuple[type[attrs.AttrsInstance], Callable[[CanonicalOrder], Sequence[object]]], ...] = (
    (Order, lambda order: (order,)),
    (Delivery, lambda order: (order.delivery,)),
    (Payment, lambda order: (order.payment,)),
    (Item, lambda order: order.items),
)
#: The structs of an order that have optional fields, and their defaults. Others cost nothing.
_WITH_DEFAULTS = [(structs_of, defaults) for model, structs_of in _PARTS if (defaults := defaults_of(model))]
_OPTIONAL_NAMES = tuple(f'"{name}"'.encode() for _, defaults in _WITH_DEFAULTS for name in defaults)

_order_values = operator.attrgetter(*_names(Order))
_delivery_values = operator.attrgetter(*_names(Delivery))
_payment_values = operator.attrgetter(*_names(Payment))
_item_values = operator.attrgetter(*_names(Item))

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Order)
#: Refuses unknown fields.
_canonical_decoder: msgspec.json.Decoder[CanonicalOrder] = msgspec.json.Decoder(_OrderStruct)


def decode_order(data: bytes) -> Order:
    """Return the order in a JSON text.

    * Types are strict: ``"99"``, ``1.0`` and ``true`` are not integers; no value may be null.
    * An optional field that is missing has its default.
    * Unknown fields may have any content, so that producers may add fields before consumers know them. The order does
      not have them: to store them, too, pass the text to ``save`` as ``original``.
    * For a repeated key the last value counts.

    Raises:
        MalformedJson: not one well-formed JSON text in UTF-8, or more than 100 levels deep.
        InvalidOrder: well-formed, but not an order; ``faults`` has every fault in document order.
        TypeError: not bytes.
    """
    _require_utf8(data)
    _require_few_levels(data)
    return _decode(data)


def decode_canonical(data: bytes) -> tuple[CanonicalOrder, bytes]:
    """Return the order in a JSON text in canonical form, and its unknown fields as ``digest`` takes them.

    Accept and refuse the same texts as ``decode_order``.
    """
    _require_utf8(data)
    try:
        # A text without unknown fields has few levels.
        order = _canonical_decoder.decode(data)
        if not _needs_report(data, order):
            order.date_created = order.date_created.astimezone(dt.UTC)
            return _share_defaults(order), b""
    except (msgspec.DecodeError, RecursionError):
        pass
    _require_few_levels(data)
    readable = _make_readable(data)
    return canonical_form(_decode_readable(data, readable)), _with_complete_stack(_unknown_text, readable)


def _require_utf8(data: bytes) -> None:
    """Raise MalformedJson for bytes that are not UTF-8."""
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, not {type(data).__name__}")
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise _malformed_error(f"bytes that are not UTF-8 (byte {exc.start})") from exc


def _require_few_levels(data: bytes) -> None:
    """Raise MalformedJson for more than ``MAX_NESTING`` levels of arrays and objects."""
    # Count first: only a large record has more brackets than that. In CPython 3.11, `count` takes six times as long.
    limit = MAX_NESTING + 1
    brackets = len(data) - len(data.replace(b"[", b"", limit).replace(b"{", b"", limit))
    if brackets > MAX_NESTING and _is_too_deep(data):
        raise _malformed_error(f"more than {MAX_NESTING:,} levels of nesting")


def _decode(data: bytes) -> Order:
    try:
        order = _decoder.decode(data)
        if not _needs_report(data, order):
            return order
    except (msgspec.DecodeError, RecursionError):
        pass
    return msgspec.convert(_with_complete_stack(_full_report, data), Order)


def _decode_readable(data: bytes, readable: bytes) -> Order:
    """Decode a text. ``readable`` is its ``_make_readable`` form.

    msgspec refuses an escaped lone surrogate, also in an unknown field. The readable form has U+0000 in its place. So
    if the order decoded from that form has no U+0000, its known fields are those of the text, and valid.
    """
    if readable is not data:
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            order = _decoder.decode(readable)
            if _has_usual_year(order) and b"\\u0000" not in encode_order(order):
                return order
    return _decode(data)


def _needs_report(data: bytes, order: _HasTime) -> bool:
    """Return whether a rule is left to check: msgspec accepts U+0000, and any year of a time in UTC."""
    return (b"\\" in data and b"\\u0000" in data) or not _has_usual_year(order)


def _has_usual_year(order: _HasTime) -> bool:
    return 1 < order.date_created.year < 9999


def encode_order(order: Order) -> bytes:
    """Return the canonical JSON of an order: the models' field order, no whitespace, UTF-8, the time in UTC with ``Z``.

    An optional field that equals its default is omitted.
    Equal orders give equal bytes, and ``decode_order`` returns an equal order.
    """
    return _encoder.encode(canonical_form(order))


def content_sha256(order: Order) -> bytes:
    """Return the SHA-256 of an order's canonical JSON, 32 bytes. It is equal exactly if the orders are equal.

    A repository returns the same digest for a stored order, unless the order has an original: that digest covers the
    unknown fields, too.
    """
    return digest(canonical_form(order))


def order_from_plain(data: object) -> Order:
    """Return the order in plain data: mappings, lists, strings, integers; the time as text or as an aware datetime.

    Nothing is coerced, and unknown keys are ignored.
    Raises InvalidOrder with the same faults as ``decode_order`` for the same content.
    """
    return _structure(data, Order)


def order_to_plain(order: Order) -> dict[str, Any]:
    """Return an order as plain data of JSON's types, in the models' order, the time in UTC as RFC 3339 text.

    ``order_from_plain`` returns an equal order.
    """
    plain: dict[str, Any] = msgspec.to_builtins(canonical_form(order))
    return plain


def register_order_hooks(converter: BaseConverter) -> None:
    """Make a cattrs converter convert the models by the rules of ``order_from_plain`` and ``order_to_plain``.

    Without these hooks cattrs coerces ``"12"`` to 12. Structuring a model raises InvalidOrder, with paths that begin at
    that model. If the model is inside a class of yours, cattrs wraps InvalidOrder in an error of its own.
    """
    for model in (Order, Delivery, Payment, Item):
        converter.register_structure_hook(model, _structure)
    converter.register_unstructure_hook(Order, order_to_plain)


def canonical_form(order: Order) -> CanonicalOrder:
    """Return an order in canonical form, or raise TypeError for anything but an ``Order``."""
    if type(order) is not Order:
        raise TypeError(f"an orderlib.Order is needed, not {type(order).__name__}")
    canonical: CanonicalOrder = _OrderStruct(*_order_values(order))
    canonical.date_created = order.date_created.astimezone(dt.UTC)
    canonical.delivery = _DeliveryStruct(*_delivery_values(order.delivery))
    canonical.payment = _PaymentStruct(*_payment_values(order.payment))
    canonical.items = [_ItemStruct(*_item_values(item)) for item in order.items]
    return _share_defaults(canonical)


def _share_defaults(order: CanonicalOrder) -> CanonicalOrder:
    """Put the default itself in place of each equal value: msgspec omits a field only if it is the same object."""
    for structs_of, defaults in _WITH_DEFAULTS:
        for struct in structs_of(order):
            for name, default in defaults.items():
                if getattr(struct, name) == default:
                    setattr(struct, name, default)
    return order


def digest(canonical: CanonicalOrder, unknown: bytes = b"") -> bytes:
    """Return the digest of an order in canonical form and of its unknown fields, as ``decode_canonical`` returns them.

    Without unknown fields it is ``content_sha256`` of the order.
    """
    return hashlib.sha256(_encoder.encode(canonical) + unknown).digest()


def _structure(data: object, cls: type[M]) -> M:
    validator = Validator()
    plain = validator.validate(data, rules_of(cls), "$")
    validator.raise_faults()
    return msgspec.convert(plain, cls)


def _with_complete_stack(function: Callable[[bytes], T], data: bytes) -> T:
    """Call a function that msgspec may end with RecursionError.

    msgspec uses a level of Python's recursion limit for each level of the text. A new thread has all of them.
    """
    try:
        return function(data)
    except RecursionError:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, data).result()


def _full_report(data: bytes) -> object:
    """Return the order in a JSON text as plain data, or raise every fault."""
    try:
        return _validate(data)
    except msgspec.DecodeError:
        # msgspec refuses an escaped lone surrogate as malformed, also in an unknown field. JSON's grammar allows it. As
        # U+0000 it stays invalid in a known field, and it does not matter in an unknown one.
        try:
            return _validate(_with_escaped_nul(_UNREADABLE, data))
        except msgspec.DecodeError as exc:
            raise _malformed_error(str(exc).removeprefix("JSON is malformed: ")) from exc


def _validate(data: bytes) -> object:
    validator = Validator(open_lazily=_open_lazily)
    plain = validator.validate(msgspec.json.decode(data, type=msgspec.Raw), rules_of(Order), "$")
    validator.raise_faults()
    return plain


#: The digits of U+0000, of a high surrogate without a low one after it, or of a low one without a high one before it.
#: The text has no escaped backslash.
_UNREADABLE_DIGITS = r"""
    0000 | [dD] (?: [89abAB][0-9a-fA-F]{2} (?! \\u[dD][c-fC-F][0-9a-fA-F]{2} )
                  | (?<! \\u[dD][89abAB][0-9a-fA-F]{2} \\u[dD] ) [c-fC-F][0-9a-fA-F]{2} )
"""
_UNREADABLE = re.compile(rf"\\u (?: {_UNREADABLE_DIGITS} )", re.VERBOSE)
_BEFORE_UNREADABLE_DIGITS = re.compile(rf"\\u (?= {_UNREADABLE_DIGITS} )", re.VERBOSE)

#: Some escapes and the text between them. It never ends within an escape or between two surrogates.
_ESCAPES = re.compile(r"(?s: \\u[dD][89abAB]..\\u[dD][c-fC-F].. | \\u.{4} | \\. | \\ | [^\\]+ ){1,1000}", re.VERBOSE)


def _with_escaped_nul(pattern: re.Pattern[str], data: bytes) -> bytes:
    r"""Return the text with ``\u0000`` in place of each match. Raise MalformedJson for a text with a raw NUL."""
    if b"\0" in data:
        raise _malformed_error("a control character")
    # A NUL replaces each escaped backslash for a moment, so that every other backslash begins an escape. The regular
    # expressions need ten times less memory on a str than on bytes, and few matches at a time need less.
    text = data.replace(rb"\\", b"\0").decode("latin-1")
    parts = (pattern.sub(r"\\u0000", part[0]).encode("latin-1") for part in _ESCAPES.finditer(text))
    return b"".join(parts).replace(b"\0", rb"\\")


#: The type of an order_uid, with its rule.
_ORDER_UID = typing.get_type_hints(Order, include_extras=True)["order_uid"]
_order_uid_decoder = msgspec.json.Decoder(msgspec.defstruct("_WithOrderUid", [("order_uid", _ORDER_UID)]))


def is_order_uid(text: str) -> bool:
    """Return whether an order may have this order_uid."""
    try:
        msgspec.convert(text, _ORDER_UID)
    except msgspec.ValidationError:
        return False
    return True


def read_order_uid(data: bytes) -> str | None:
    """Return the order_uid in the JSON text of an order, also if other fields are invalid.

    Return ``None`` without a valid order_uid. It is the same as that of ``decode_order`` for every text which that
    accepts.
    """
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        (order_uid,) = msgspec.structs.astuple(_order_uid_decoder.decode(data))
        return str(order_uid)
    # msgspec refuses an escaped lone surrogate, and an invalid order_uid before the one that counts, the last.
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, MalformedJson):
        last = _OBJECT.decode(_make_readable(data))["order_uid"]
        return str(msgspec.json.decode(last, type=_ORDER_UID))
    return None


def unknown_fields(data: bytes) -> dict[str, dict[str, msgspec.Raw]]:
    """Return the unknown fields of an order: by the path of the object that has them, then by name. Values are JSON.

    The text must be one that ``decode_order`` accepts. In names and values, U+0000 stands for U+0000 or a lone
    surrogate, and the four hexadecimal digits behind it say which.
    """
    return _unknown_fields(_make_readable(data))


def _make_readable(data: bytes) -> bytes:
    """Return a text that msgspec can read as raw values, and in which different names remain different."""
    return _with_escaped_nul(_BEFORE_UNREADABLE_DIGITS, data) if b"\\u" in data else data


def _unknown_fields(readable: bytes, hidden: HiddenFields = frozenset()) -> dict[str, dict[str, msgspec.Raw]]:
    found: dict[str, dict[str, msgspec.Raw]] = {}
    _find_unknown(_OBJECT.decode(readable), Order, "$", found, hidden)
    return found


def _find_unknown(
    fields: dict[str, msgspec.Raw],
    model: Hashable,
    path: str,
    found: dict[str, dict[str, msgspec.Raw]],
    hidden: HiddenFields,
) -> None:
    """Add the unknown ones of these fields and of their parts to ``found``. Remove the known ones from ``fields``."""
    for name, (part, is_array) in _layout(model).items():
        if (model, name) in hidden:
            continue
        value = fields.pop(name, None)
        if part is None or value is None:
            continue
        if is_array:
            for index, item in enumerate(_OBJECTS.decode(value)):
                _find_unknown(item, part, f"{path}.{name}[{index}]", found, hidden)
        else:
            _find_unknown(_OBJECT.decode(value), part, f"{path}.{name}", found, hidden)
    if fields:
        found[path] = fields


@functools.cache
def _layout(model: Hashable) -> Mapping[str, tuple[Hashable, bool]]:
    """Return a model's fields by name: the model of its value, if it has one, and whether it is an array of them."""
    rules = {field.encode_name: rule_of(field) for field in rules_of(model).fields}
    return {name: (model_of(rule), isinstance(rule, VarTupleType)) for name, rule in rules.items()}


def _unknown_text(readable: bytes, hidden: HiddenFields = frozenset()) -> bytes:
    """Return the unknown fields as lines of JSON, sorted and without other whitespace; empty if the order has none.

    A line is the path of an object, or the name and the value of one of its unknown fields.
    """
    found = _unknown_fields(msgspec.json.format(readable, indent=-1), hidden)
    lines: list[bytes] = []
    for path in sorted(found):
        lines.append(_encoder.encode(path))
        # msgspec sorts members by a quicksort, for which a sender could make an input that takes minutes.
        fields = found[path]
        # Taken out of the dict one by one, because each of them needs more memory than its line.
        lines += sorted(_encoder.encode(fields.popitem()) for _ in range(len(fields)))
    return b"\n".join(lines)


def earlier_forms(data: bytes) -> Iterator[tuple[CanonicalOrder, bytes]]:
    """Yield an order as releases that did not know its last optional fields decoded it, if they found unknown fields.

    The parts are those that ``decode_canonical`` returns. A text that those releases refused yields nothing.
    """
    optional = [[(model, name) for name in defaults_of(model)] for model, _ in _PARTS]
    for known in itertools.product(*(range(len(fields) + 1) for fields in optional)):
        hidden = frozenset(itertools.chain(*(fields[n:] for n, fields in zip(known, optional, strict=True))))
        if not hidden:
            continue
        with contextlib.suppress(RejectedError, msgspec.DecodeError):
            if unknown := _with_complete_stack(functools.partial(_unknown_text, hidden=hidden), _make_readable(data)):
                yield _without_fields(hidden, data), unknown


def required_sha256(data: bytes) -> bytes:
    """Return the digest of the required fields of an order: releases that ignored unknown fields knew no others."""
    return digest(_without_fields(frozenset((model, name) for model, _ in _PARTS for name in defaults_of(model)), data))


def may_have_optional_fields(data: bytes) -> bool:
    """Return whether the name of an optional field occurs in a text."""
    return any(name in data for name in _OPTIONAL_NAMES)


def _without_fields(hidden: HiddenFields, data: bytes) -> CanonicalOrder:
    """Return the order in a JSON text without its unknown fields and without these ones."""
    known = _with_complete_stack(functools.partial(_known_fields, model=Order, hidden=hidden), _make_readable(data))
    return decode_canonical(msgspec.json.encode(known))[0]


def _known_fields(readable: bytes | msgspec.Raw, model: Hashable, hidden: HiddenFields) -> dict[str, object]:
    fields = _OBJECT.decode(readable)
    known: dict[str, object] = {}
    for name, (part, is_array) in _layout(model).items():
        if name not in fields or (model, name) in hidden:
            continue
        if part is None:
            known[name] = fields[name]
        elif is_array:
            known[name] = [_known_fields(item, part, hidden) for item in _ARRAY_OF_RAW.decode(fields[name])]
        else:
            known[name] = _known_fields(fields[name], part, hidden)
    return known


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_ARRAY_OF_RAW = msgspec.json.Decoder(list[msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
#: Opens an array up to one element above the limit, and skips the others without using memory for them.
_ARRAY = msgspec.json.Decoder(
    msgspec.defstruct(
        "_Array", [(f"at_{i}", msgspec.Raw, msgspec.Raw()) for i in range(MAX_ITEMS + 1)], array_like=True
    )
)


def _open_lazily(value: object, rule: Type) -> object:
    """Open a raw JSON value one level deep if its rule asks for that; otherwise return any value of the same kind."""
    assert isinstance(value, bytes | msgspec.Raw)
    data = bytes(value)
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
    # An integer of more than 20 characters is out of bounds. Python refuses to parse 5,000 digits.
    return int(data) if len(data) <= 20 else int(data[:20]) * 10


_NEITHER_BRACKETS_NOR_QUOTES = bytes(set(range(256)) - set(b'[]{}"'))
_ROUND = bytes.maketrans(b"[]{}", b"()()")
_RUN = re.compile(rb"\(+|\)+")
_CHUNK_BYTES = 64 * 1024


def _is_too_deep(data: bytes) -> bool:
    """Return whether a text nests more than ``MAX_NESTING`` levels. For malformed JSON the answer may be wrong."""
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = _outside_strings(unescaped.translate(_ROUND, _NEITHER_BRACKETS_NOR_QUOTES))
    levels = 0
    # Remove the innermost pairs, one level at a time, while they are many. After that few runs of brackets are left.
    while len(fewer := brackets.replace(b"()", b"")) < 0.9 * len(brackets):
        brackets, levels = fewer, levels + 1
    deepest = levels
    for run in _RUN.finditer(brackets):
        length = run.end() - run.start()
        levels += length if brackets[run.start()] == ord("(") else -length
        deepest = max(deepest, levels)
    return deepest > MAX_NESTING


def _outside_strings(text: bytes) -> bytes:
    """Return what stands outside of quotes. Work in chunks: each part needs far more memory than its length."""
    outside, is_inside = [], 0
    for start in range(0, len(text), _CHUNK_BYTES):
        parts = text[start : start + _CHUNK_BYTES].split(b'"')
        outside.append(b"".join(parts[is_inside::2]))
        is_inside ^= (len(parts) - 1) & 1
    return b"".join(outside)


def _malformed_error(found: str) -> MalformedJson:
    return MalformedJson([Fault(path="$", expected="one JSON text in UTF-8", found=found)])


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of an order, a new dict at each call.

    It refers to nothing outside itself. Unknown fields are allowed. Patterns have the same meaning in RE2, ECMAScript
    and Python. The schema accepts every order that ``decode_order`` accepts, except that a validator which verifies
    ``format`` may refuse spellings of ``date_created`` that RFC 3339 does not have, such as a space instead of the T.
    It also accepts what JSON Schema cannot exclude: 1.0 as an integer, and, if the validator does not verify
    ``format``, any text as ``date_created``.
    """
    [schema], parts = model_schemas(Order, ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": parts}
