"""Valid and invalid values around every bound of a rule, derived from the rule."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import attrs
from msgspec.inspect import DateTimeType, IntType, StrType, Type

from orderlib import Delivery, InvalidOrder, Item, Order, Payment, decode_order, encode_order
from orderlib.contract import rule_of, rules_of

#: One code point each, of one, two, three and four bytes in UTF-8; and one that combines with its neighbour.
_CHARACTERS = "aé€\U0001f600\u0301"

_OFFSETS = [dt.timedelta(minutes=minutes) for minutes in (-(24 * 60 - 1), -60, 0, 330, 14 * 60, 24 * 60 - 1)]


@attrs.frozen
class Place:
    """A scalar field of an order: of the order itself, its delivery, its payment, or its first item."""

    #: ``None`` for the order itself.
    part: str | None
    model: type[attrs.AttrsInstance]
    name: str
    rule: Type
    is_required: bool = True

    def __str__(self) -> str:
        return f"{self.part or 'order'}.{self.name}"

    @property
    def path(self) -> str:
        """Return the JSON path of the field."""
        prefix = {None: "$", "items": "$.items[0]"}.get(self.part, f"$.{self.part}")
        return f"{prefix}.{self.name}"

    def in_model(self, order: Order, value: Any) -> Order:
        """Return the order with this value in this field, or raise InvalidOrder."""
        match self.part:
            case None:
                return attrs.evolve(order, **{self.name: value})
            case "items":
                item = attrs.evolve(order.items[0], **{self.name: value})
                return attrs.evolve(order, items=[item, *order.items[1:]])
            case part:
                changed = attrs.evolve(getattr(order, part), **{self.name: value})
                return attrs.evolve(order, **{part: changed})

    def in_json(self, order: Order, value: object) -> bytes:
        """Return the JSON of the order with this value in this field; times as RFC 3339."""
        plain = json.loads(encode_order(order))
        holder = plain if self.part is None else plain[self.part]
        (holder[0] if self.part == "items" else holder)[self.name] = value
        return json.dumps(plain, default=dt.datetime.isoformat).encode()


PLACES = [
    Place(part, model, field.name, rule_of(field), field.required)
    for part, model in ((None, Order), ("delivery", Delivery), ("payment", Payment), ("items", Item))
    for field in rules_of(model).fields
    if isinstance(rule_of(field), StrType | IntType | DateTimeType)
]


def boundary_values(rule: Type) -> Iterator[object]:
    """Yield values of the rule's type on both sides of its bounds and of other common bounds."""
    match rule:
        case StrType():
            yield from _texts(rule)
        case IntType(ge=minimum, le=maximum):
            for bound in (minimum, maximum, 0, 100, 2**15, 2**31 - 1, 2**53, 2**63 - 1, 2**64 - 1, -(2**31), -(2**63)):
                if bound is not None:
                    yield from (bound - 1, bound, bound + 1)
        case DateTimeType():
            yield dt.datetime(2021, 11, 26, 6, 22, 19)  # noqa: DTZ001  invalid: without an offset
            for offset in _OFFSETS:
                zone = dt.timezone(offset)
                first, last = dt.datetime.min.replace(tzinfo=zone), dt.datetime.max.replace(tzinfo=zone)
                for inwards in (dt.timedelta(), abs(offset), dt.timedelta(days=1)):
                    yield first + inwards
                    yield last - inwards
                yield dt.datetime(2021, 11, 26, 6, 22, 19, 123456, tzinfo=zone)
        case _:
            raise NotImplementedError(f"no boundary values for {rule}")


def _texts(rule: StrType) -> Iterator[str]:
    minimum, maximum = rule.min_length or 0, rule.max_length or 0
    for length in {0, max(minimum - 1, 0), minimum, 1, 2, 3, 4, maximum - 1, maximum, maximum + 1}:
        for character in _CHARACTERS:
            yield character * length
    yield from (
        ".",
        "..",
        "...",
        ".\n",
        "USD",
        "XAF",
        "USD\n",
        "US\n",
        "\nUSD",
        "usd",
        "ÜSD",
        "US\N{FULLWIDTH DIGIT ONE}",
    )
    yield from (
        " ",
        "\n",
        "\t",
        "\x01",
        "\x7f",
        "\ufeff",
        "\ufffe",
        "\uffff",
        "\U0010ffff",
        "'",
        '"',
        "\\",
        "\\.",
        "a\\n",
    )
    # No high surrogate before a low one: those are two characters in Python, but one in JSON.
    yield from ("\0", "a\0", "\0a", "\ud800", "a\udfff", "\ude00\ud83d")


def model_accepts(place: Place, order: Order, value: object) -> bool:
    """Return whether a model created in Python accepts the value."""
    try:
        place.in_model(order, value)
    except InvalidOrder:
        return False
    return True


def decoder_accepts(place: Place, order: Order, value: object) -> bool:
    """Return whether the decoder accepts the value, or raises InvalidOrder with another path."""
    try:
        decode_order(place.in_json(order, value))
    except InvalidOrder as refusal:
        return [fault.path for fault in refusal.faults] != [place.path]
    return True
