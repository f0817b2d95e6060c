"""Hypothesis strategies for valid orders. They need ``orderlib[testing]``.

They are derived from the rules on the models. They draw every value that the contract allows: any Unicode text,
integers at their bounds, any instant, any offset.
"""

from __future__ import annotations

import datetime as dt

from hypothesis import strategies as st
from msgspec.inspect import DataclassType, DateTimeType, Field, IntType, StrType, Type, VarTupleType

from orderlib.contract import M, rule_of, rules_of, within_utc_years
from orderlib.models import Delivery, Item, Order, Payment

_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")

#: RFC 3339 writes offsets as ±hh:mm.
_OFFSETS = st.integers(-(24 * 60 - 1), 24 * 60 - 1).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))


def orders(*, max_items: int = 3) -> st.SearchStrategy[Order]:
    """Return a strategy for valid orders with at most ``max_items`` items."""
    return _instances(Order, max_items)


def deliveries() -> st.SearchStrategy[Delivery]:
    """Return a strategy for valid deliveries."""
    return _instances(Delivery, 0)


def payments() -> st.SearchStrategy[Payment]:
    """Return a strategy for valid payments."""
    return _instances(Payment, 0)


def items() -> st.SearchStrategy[Item]:
    """Return a strategy for valid items."""
    return _instances(Item, 0)


def values(rule: Type, *, max_items: int = 3) -> st.SearchStrategy[object]:
    """Return a strategy for the values that a rule allows in a model. An array has at most ``max_items`` items."""
    match rule:
        case DataclassType(cls=cls):
            return _instances(cls, max_items)
        case VarTupleType(item_type=item, min_length=minimum, max_length=maximum):
            longest = max_items if maximum is None else min(max_items, maximum)
            return st.lists(values(item), min_size=minimum or 0, max_size=longest).map(tuple)
        case StrType(min_length=minimum, max_length=int(limit), pattern=None):
            # Hypothesis seldom draws a text of hundreds of characters.
            full = _CHARACTERS.map(lambda character: character * limit)
            return st.text(_CHARACTERS, min_size=minimum or 0, max_size=limit) | full
        case StrType(min_length=minimum, max_length=maximum, pattern=str(pattern)):
            matching = st.from_regex(pattern, alphabet=_CHARACTERS)
            return matching.filter(lambda text: (minimum or 0) <= len(text) <= (maximum or len(text)))
        case IntType(ge=minimum, le=maximum):
            return st.integers(minimum, maximum)
        case DateTimeType():
            return st.datetimes(timezones=_OFFSETS).filter(within_utc_years)
        case _:
            raise NotImplementedError(f"the contract has no rule of kind {rule}")


def _instances(cls: type[M], max_items: int) -> st.SearchStrategy[M]:
    fields = {field.name: _field(field, max_items) for field in rules_of(cls).fields}
    return st.builds(cls, **fields)


def _field(field: Field, max_items: int) -> st.SearchStrategy[object]:
    any_value = values(rule_of(field), max_items=max_items)
    return any_value if field.required else any_value | st.just(field.default)
