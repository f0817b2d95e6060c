"""The rules on the models, in the decoder, in the constructors, in words and in JSON Schema."""

from __future__ import annotations

import copy
import datetime as dt
import enum
import json
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import Mock
from zoneinfo import ZoneInfo

import attrs
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.inspect import DateTimeType, IntType, StrType

from orderlib import (
    Delivery,
    InvalidOrder,
    Item,
    Order,
    Payment,
    content_sha256,
    decode_order,
    encode_order,
    json_schema,
    order_from_plain,
    order_to_plain,
)
from orderlib.contract import describe, field_rules, plain_time, rules_of, unchecked
from orderlib.models import MAX_ITEMS
from orderlib.testing import SAMPLE, MemoryOrderRepository
from orderlib.testing.strategies import deliveries, items, orders, payments, values
from tests.support.boundary_values import PLACES, Place, boundary_values, decoder_accepts, model_accepts

SAMPLE_ORDER = decode_order(SAMPLE)

#: A value of each type of JSON and of some types of Python. A scalar field accepts none but those of its own type.
FOREIGN = [None, True, 0, 1.0, 0.5, float("nan"), "99", b"99", [], {}, (), object()]


_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class Currency(enum.StrEnum):
    EURO = "EUR"


def faults_of(make: object) -> list[tuple[str, str]]:
    assert callable(make)
    with pytest.raises(InvalidOrder) as caught:
        make()
    return [(fault.path, fault.found) for fault in caught.value.faults]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_models_and_decoder_accept_the_same_values_around_every_bound(place: Place) -> None:
    tried = {value: model_accepts(place, SAMPLE_ORDER, value) for value in boundary_values(place.rule)}
    assert set(tried.values()) == {True, False}
    assert tried == {value: decoder_accepts(place, SAMPLE_ORDER, value) for value in tried}


@given(st.sampled_from(PLACES), st.data())
def test_models_and_decoder_accept_the_same_values_drawn_at_random(place: Place, data: st.DataObject) -> None:
    any_text = st.text(st.characters(), max_size=300).filter(lambda text: not _SURROGATE_PAIR.search(text))
    value = data.draw(st.one_of(values(place.rule), any_text, st.integers()), label=str(place))
    if isinstance(value, str) and not isinstance(place.rule, StrType):
        return
    assert model_accepts(place, SAMPLE_ORDER, value) == decoder_accepts(place, SAMPLE_ORDER, value)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_models_accept_no_value_of_another_type(place: Place) -> None:
    own_type = type(next(boundary_values(place.rule)))
    for value in FOREIGN:
        if type(value) is not own_type:
            assert not model_accepts(place, SAMPLE_ORDER, value), value


@pytest.mark.parametrize("count", [0, 1, MAX_ITEMS, MAX_ITEMS + 1])
def test_models_and_decoder_agree_about_the_number_of_items(count: int) -> None:
    many = SAMPLE_ORDER.items[:1] * count
    plain = order_to_plain(SAMPLE_ORDER)
    plain["items"] = plain["items"][:1] * count
    if 1 <= count <= MAX_ITEMS:
        assert attrs.evolve(SAMPLE_ORDER, items=many) == decode_order(json.dumps(plain).encode())
    else:
        found = f"an array of {'more than 1,000' if count else 0} values"
        assert faults_of(lambda: attrs.evolve(SAMPLE_ORDER, items=many)) == [("$.items", found)]
        assert faults_of(lambda: decode_order(json.dumps(plain).encode())) == [("$.items", found)]


def test_a_model_reports_every_fault_at_once() -> None:
    found = faults_of(lambda: attrs.evolve(SAMPLE_ORDER.items[0], sale=101, rid="", price=-1, brand="x" * 256))
    assert found == [
        ("$.price", "a smaller integer"),
        ("$.rid", "a string of 0 characters"),
        ("$.sale", "a greater integer"),
        ("$.brand", "a string of 256 characters"),
    ]


def test_plain_data_in_place_of_a_model_or_a_time_is_a_fault_of_the_model() -> None:
    plain = order_to_plain(SAMPLE_ORDER)
    assert faults_of(
        lambda: attrs.evolve(
            SAMPLE_ORDER, date_created=plain["date_created"], delivery=plain["delivery"], items=plain["items"]
        )
    ) == [
        ("$.date_created", "a string"),
        ("$.delivery", "a Python dict"),
        ("$.items[0]", "a Python dict"),
        ("$.items[1]", "a Python dict"),
    ]


def test_subclasses_of_plain_types_are_faults_named_by_their_type() -> None:
    """The encoder, the driver and the comparison would each treat them differently. A time is made plain instead."""
    assert faults_of(lambda: attrs.evolve(SAMPLE_ORDER, entry=Currency.EURO, sm_id=True)) == [
        ("$.entry", "a Python Currency"),
        ("$.sm_id", "a boolean"),
    ]


@pytest.mark.parametrize("not_items", [None, 7, SAMPLE_ORDER.items[0]])
def test_items_that_are_not_a_collection_are_a_fault(not_items: Any) -> None:
    [(path, _)] = faults_of(lambda: attrs.evolve(SAMPLE_ORDER, items=not_items))
    assert path == "$.items"


def test_items_may_come_from_any_iterable() -> None:
    def one_by_one() -> Iterator[Item]:
        yield from SAMPLE_ORDER.items

    assert attrs.evolve(SAMPLE_ORDER, items=one_by_one()) == SAMPLE_ORDER
    assert attrs.evolve(SAMPLE_ORDER, items=list(SAMPLE_ORDER.items)) == SAMPLE_ORDER


def test_an_order_cannot_be_changed_and_copies_are_equal() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        SAMPLE_ORDER.sm_id = 1  # type: ignore[misc]  # it is frozen
    for copied in (copy.deepcopy(SAMPLE_ORDER), pickle.loads(pickle.dumps(SAMPLE_ORDER))):  # noqa: S301 - our own
        assert copied == SAMPLE_ORDER
        assert hash(copied) == hash(SAMPLE_ORDER)


def test_orders_whose_times_are_the_same_instant_are_equal() -> None:
    elsewhere = SAMPLE_ORDER.date_created.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30)))
    moved = attrs.evolve(SAMPLE_ORDER, date_created=elsewhere)
    assert moved == SAMPLE_ORDER
    assert hash(moved) == hash(SAMPLE_ORDER)


class Stamp(dt.datetime):
    """A time of a library, with a method that returns something else."""

    def date(self) -> dt.date:
        return dt.date(1970, 1, 1)


@pytest.fixture(params=["as it is", "replaced in its module", "replaced in every module"])
def stamp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[dt.datetime]:
    """A subclass of ``datetime``, which replaces it as a test or as freezegun does."""
    plain_class = dt.datetime
    if request.param == "replaced in every module":
        for module in [module for name, module in sys.modules.items() if name.startswith("orderlib")]:
            for name, value in list(vars(module).items()):
                if value is plain_class:
                    monkeypatch.setattr(module, name, Stamp)
    if request.param != "as it is":
        monkeypatch.setattr("datetime.datetime", Stamp)
    return plain_class


@pytest.mark.parametrize("offset", [dt.timedelta(), dt.timedelta(hours=-9), dt.timedelta(hours=23, minutes=59)])
def test_a_time_of_a_subclass_becomes_an_equal_plain_one(stamp: type[dt.datetime], offset: dt.timedelta) -> None:
    time = Stamp(2026, 2, 3, 4, 5, 6, 7, tzinfo=dt.timezone(offset))
    order = attrs.evolve(SAMPLE_ORDER, date_created=time)
    for made in (order, order_from_plain({**order_to_plain(order), "date_created": time}), decode_order(SAMPLE)):
        assert type(made.date_created) is stamp
    assert (order.date_created, order.date_created.tzinfo) == (time, time.tzinfo)
    assert order_from_plain(order_to_plain(order)) == decode_order(encode_order(order)) == order
    assert attrs.evolve(order, sm_id=1).date_created == time


def test_the_time_of_a_subclass_in_an_hour_that_clocks_repeat_is_the_same_instant() -> None:
    times = [Stamp(2025, 10, 26, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin")) for fold in (0, 1)]
    found = [attrs.evolve(SAMPLE_ORDER, date_created=time).date_created.astimezone(dt.UTC) for time in times]
    assert found == [dt.datetime(2025, 10, 26, hour, 30, tzinfo=dt.UTC) for hour in (0, 1)]


@pytest.mark.parametrize(
    ("time", "found"),
    [
        (Stamp(2026, 1, 1), "a time without an offset"),
        (Stamp(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))), "a time outside these years"),
        (dt.date(2026, 1, 1), "a Python date"),
    ],
)
def test_a_time_of_a_subclass_obeys_the_rules(time: Any, found: str) -> None:
    plain = {**order_to_plain(SAMPLE_ORDER), "date_created": time}
    assert faults_of(lambda: attrs.evolve(SAMPLE_ORDER, date_created=time)) == [("$.date_created", found)]
    assert faults_of(lambda: order_from_plain(plain)) == [("$.date_created", found)]


def test_every_time_of_a_model_becomes_a_plain_one() -> None:
    for model in (Order, Delivery, Payment, Item):
        fields = {field.name: field for field in attrs.fields(model)}
        for name, rule in field_rules(model).items():
            assert not isinstance(rule, DateTimeType) or fields[name].converter is plain_time


def test_unchecked_returns_what_the_constructor_would() -> None:
    fields = {field.name: getattr(SAMPLE_ORDER.delivery, field.name) for field in attrs.fields(Delivery)}
    assert unchecked(Delivery, **fields) == SAMPLE_ORDER.delivery


@given(orders(), deliveries(), payments(), items())
@settings(max_examples=25)
def test_drawn_parts_make_a_valid_order(order: Order, delivery: Delivery, payment: Payment, item: Item) -> None:
    assert attrs.evolve(order, delivery=delivery, payment=payment, items=[item]).items == (item,)


class Base:
    pass


class Mixin(Base):
    def __init_subclass__(cls, **_: object) -> None:
        """Do not call the next one."""


@pytest.mark.parametrize("model", [Order, Delivery, Payment, Item])
def test_an_order_and_its_parts_cannot_be_subclassed(model: type) -> None:
    for bases in ((model,), (Base, model)):
        with pytest.raises(TypeError, match="Sub cannot be a subclass: an order and its parts are final"):
            types.new_class("Sub", bases)
    assert getattr(model, "__final__", False)


def test_an_instance_of_a_forced_subclass_is_refused_everywhere() -> None:
    escaped = types.new_class("Sub", (Mixin, Order))
    fields = {field.name: getattr(SAMPLE_ORDER, field.name) for field in attrs.fields(Order)}
    order = escaped(**fields)
    for function in (encode_order, content_sha256, order_to_plain, MemoryOrderRepository().save):
        with pytest.raises(TypeError, match=r"an orderlib\.Order is needed, not Sub"):
            function(order)
    part = types.new_class("Part", (Mixin, Delivery))(
        **{field.name: getattr(SAMPLE_ORDER.delivery, field.name) for field in attrs.fields(Delivery)}
    )
    assert faults_of(lambda: attrs.evolve(SAMPLE_ORDER, delivery=part)) == [("$.delivery", "a Python Part")]


@pytest.mark.parametrize("function", [encode_order, content_sha256, order_to_plain, MemoryOrderRepository().save])
@pytest.mark.parametrize("value", ["x", b"{}", None, order_to_plain(SAMPLE_ORDER), SAMPLE_ORDER.delivery, Mock(Order)])
def test_functions_of_an_order_refuse_anything_else(function: Callable[[Any], object], value: object) -> None:
    with pytest.raises(TypeError, match=r"an orderlib\.Order is needed, not \w+"):
        function(value)


@pytest.mark.skipif(not hasattr(copy, "replace"), reason="Python 3.13 has copy.replace")
def test_copy_replace_validates_like_evolve() -> None:
    assert faults_of(lambda: copy.replace(SAMPLE_ORDER.items[0], sale=101)) == [  # type: ignore[attr-defined,unused-ignore]  # Python 3.13
        ("$.sale", "a greater integer")
    ]


def test_rules_are_described_in_words() -> None:
    words = {describe(place.rule) for place in PLACES}
    assert "three capital letters (ISO 4217)" in words
    assert "1 to 128 of the characters A-Z a-z 0-9 . _ : - but not . or .. alone" in words
    assert "a string of at most 255 characters" in words
    for text in words:
        assert not re.search(r"[\\^$]|\b(\d+) to \1\b(?!,)|\b1 \w+s\b", text), text


@pytest.mark.parametrize(
    ("length", "found"),
    [(0, "a string of 0 characters"), (1, "a string of 1 character"), (4, "a string of 4 characters")],
)
def test_a_length_in_a_fault_is_singular_or_plural(length: int, found: str) -> None:
    assert faults_of(lambda: attrs.evolve(SAMPLE_ORDER.payment, currency="X" * length)) == [("$.currency", found)]


def test_a_rule_of_an_unknown_kind_has_no_description() -> None:
    with pytest.raises(NotImplementedError, match="no rule of kind"):
        describe(rules_of(Order).fields[0])  # type: ignore[arg-type]  # a wrong type


# JSON Schema


def test_the_patterns_of_the_json_schema_compile_in_every_engine() -> None:
    """RE2 has no look-around and no ``\\u`` escape; ``\\A``, ``\\Z`` and ``\\z`` differ between engines."""
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', json.dumps(json_schema()))
    assert len(set(patterns)) == 4
    for pattern in map(json.loads, set(patterns)):
        re.compile(pattern)
        assert not re.search(r"\(\?|\\[uAZzpPkdwsb1-9]", pattern), pattern


def test_the_json_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_json_schema_is_complete_and_belongs_to_the_caller() -> None:
    schema = json_schema()
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)))
    assert references == {f"#/$defs/{name}" for name in schema["$defs"]}
    schema["$defs"].clear()
    assert json_schema()["$defs"].keys() == {"Order", "Delivery", "Payment", "Item"}


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_json_schema_accepts_what_the_decoder_accepts(place: Place) -> None:
    """Except what JSON Schema cannot express: that 1.0 is not 1, which texts are times, what a lone surrogate is."""
    validator = jsonschema.Draft202012Validator(json_schema())
    of_another_type: list[object] = [None, True, 0.5, [], {}, "7" if isinstance(place.rule, IntType) else 7]
    of_its_own = [
        value for value in boundary_values(place.rule) if not isinstance(value, dt.datetime) and _encodable(value)
    ]
    for value in of_another_type + of_its_own:
        record = place.in_json(SAMPLE_ORDER, value)
        assert validator.is_valid(json.loads(record)) == decoder_accepts(place, SAMPLE_ORDER, value), value


@pytest.mark.parametrize("part", [None, "delivery", "payment", "items"])
def test_the_json_schema_requires_every_field_without_a_default_and_accepts_unknown_ones(part: str | None) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())

    def with_part(change: Mapping[str, object], without: str | None = None) -> dict[str, object]:
        plain = json.loads(SAMPLE)
        holder = plain if part is None else plain[part][0] if part == "items" else plain[part]
        holder |= change
        if without:
            holder.pop(without, None)
        return dict(plain)

    assert validator.is_valid(with_part({"later": [1]}))
    for place in PLACES:
        if place.part == part:
            assert validator.is_valid(with_part({}, without=place.name)) != place.is_required, place


def _encodable(value: object) -> bool:
    return not (isinstance(value, str) and re.search("[\ud800-\udfff]", value))
