"""The codec, on every valid order and on every order with one fault."""

from __future__ import annotations

import datetime as dt
import json
import traceback
import typing
from collections.abc import Mapping
from random import Random
from typing import Any

import attrs
import cattrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import orderlib
from orderlib import (
    Delivery,
    Fault,
    InvalidOrder,
    Item,
    MalformedJson,
    Order,
    Payment,
    RejectedError,
    content_sha256,
    decode_order,
    encode_order,
    order_from_plain,
    order_to_plain,
)
from orderlib.codecs import CanonicalOrder, canonical_form, decode_canonical, digest, read_order_uid
from orderlib.contract import defaults_of
from orderlib.errors import MAX_FAULTS
from orderlib.models import MAX_ITEMS
from orderlib.testing import SAMPLE, FaultKind, break_order
from orderlib.testing.strategies import orders
from tests.support.boundary_values import PLACES, Place, boundary_values, model_accepts
from tests.support.fuzz_decoder import order_or_error
from tests.support.reference_decoder import comparable, reference_decode

SAMPLE_ORDER = decode_order(SAMPLE)

#: The sample as canonical JSON: the fields in the order of the models, no whitespace, UTC.
CANONICAL_SAMPLE = (
    b'{"order_uid":"b563feb7b2b84b6test","track_number":"WBILMTESTTRACK","entry":"WBIL","locale":"en",'
    b'"internal_signature":"","customer_id":"test","delivery_service":"meest","shardkey":"9","sm_id":99,'
    b'"date_created":"2021-11-26T06:22:19Z","oof_shard":"1",'
    b'"delivery":{"name":"Test Testov","phone":"+9720000000","zip":"2639809","city":"Kiryat Mozkin",'
    b'"address":"Ploshad Mira 15","region":"Kraiot","email":"test@gmail.com"},'
    b'"payment":{"transaction":"b563feb7b2b84b6test","request_id":"","currency":"USD","provider":"wbpay",'
    b'"amount":1817,"payment_dt":1637907727,"bank":"alpha","delivery_cost":1500,"goods_total":317,"custom_fee":0},'
    b'"items":[{"chrt_id":9934930,"track_number":"WBILMTESTTRACK","price":453,"rid":"ab4219087a764ae0btest",'
    b'"name":"Mascaras","sale":30,"size":"0","total_price":317,"nm_id":2389212,"brand":"Vivienne Sabo","status":202},'
    b'{"chrt_id":9934931,"track_number":"WBILMTESTTRACK","price":453,"rid":"ab4219087a764ae0btest2",'
    b'"name":"Mascaras","sale":30,"size":"0","total_price":317,"nm_id":2389212,"brand":"Vivienne Sabo","status":202}]}'
)

seeds = st.integers(0, 2**32).map(Random)


def sample_with(**changes: object) -> bytes:
    """The sample's JSON with these fields of the order changed."""
    return json.dumps({**json.loads(SAMPLE), **changes}).encode()


def faults_in(data: bytes) -> tuple[Fault, ...]:
    with pytest.raises(InvalidOrder) as caught:
        decode_order(data)
    return caught.value.faults


# Decoding and encoding


def test_the_sample_is_an_order_and_canonical_json_follows_the_contract() -> None:
    assert encode_order(SAMPLE_ORDER) == CANONICAL_SAMPLE
    assert decode_order(CANONICAL_SAMPLE) == SAMPLE_ORDER


@given(orders())
@settings(max_examples=50)
def test_decoding_an_encoded_order_returns_an_equal_order(order: Order) -> None:
    assert decode_order(encode_order(order)) == order


@given(orders(), seeds)
@settings(max_examples=50)
def test_equal_orders_have_the_same_canonical_json_whatever_their_original_json(order: Order, rng: Random) -> None:
    written = written_otherwise(order, rng)
    again = decode_order(written)
    assert again == order
    assert encode_order(again) == encode_order(order)
    canonical, _unknown = decode_canonical(written)
    assert content_sha256(again) == content_sha256(order) == digest(canonical)


def test_the_canonical_form_has_the_fields_of_the_models() -> None:
    canonical: Any = canonical_form(SAMPLE_ORDER)
    for part, model in (
        (canonical, Order),
        (canonical.delivery, Delivery),
        (canonical.payment, Payment),
        (canonical.items[0], Item),
    ):
        assert part.__struct_fields__ == tuple(attrs.fields_dict(model))
    assert set(CanonicalOrder.__annotations__) <= set(attrs.fields_dict(Order))
    types = typing.get_type_hints(Order)
    for name in ("order_uid", "date_created"):
        assert typing.get_type_hints(CanonicalOrder)[name] is types[name]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_orders_that_differ_in_one_value_have_different_digests(place: Place) -> None:
    accepted = [value for value in boundary_values(place.rule) if model_accepts(place, SAMPLE_ORDER, value)]
    different = {place.in_model(SAMPLE_ORDER, value) for value in accepted}
    assert len({content_sha256(order) for order in different}) == len(different) > 1


def written_otherwise(order: Order, rng: Random) -> bytes:
    """Return JSON of the same order with shuffled keys, another offset, escapes and whitespace, and unknown fields."""
    plain = order_to_plain(order)
    zone = dt.timezone(dt.timedelta(minutes=rng.randint(-1439, 1439)))
    try:
        plain["date_created"] = order.date_created.astimezone(zone).isoformat(rng.choice("T "))
    except OverflowError:
        # Near year 1 or 9999 not every offset can be written.
        plain["date_created"] = plain["date_created"].replace("Z", "-00:00")

    def shuffled(value: Any) -> Any:
        if isinstance(value, list):
            return [shuffled(part) for part in value]
        if not isinstance(value, dict):
            return value
        fields = [(name, shuffled(part)) for name, part in value.items()]
        fields.append(("later", rng.choice([None, "\ud800\0", [[]], 1e300, {"order_uid": 1}])))
        rng.shuffle(fields)
        return dict(fields)

    return json.dumps(shuffled(plain), ensure_ascii=True, indent=rng.choice([None, 1, "\t", "\r"])).encode()


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("2021-11-26T06:22:19Z", "2021-11-26T06:22:19Z"),
        ("2021-11-26t11:52:19+05:30", "2021-11-26T06:22:19Z"),
        ("2021-11-26 06:22:19-0000", "2021-11-26T06:22:19Z"),
        ("2021-11-26T06:22:19.5Z", "2021-11-26T06:22:19.500000Z"),
        ("2021-11-26T06:22:19.1234564999Z", "2021-11-26T06:22:19.123456Z"),
        ("2021-11-26T06:22:19.1234565Z", "2021-11-26T06:22:19.123457Z"),
        ("2021-12-31T23:59:59.9999999Z", "2022-01-01T00:00:00Z"),
        ("0001-01-01T23:59:00+23:59", "0001-01-01T00:00:00Z"),
        ("9999-12-31T00:00:59.999999-23:59", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_times_are_written_in_utc_to_the_microsecond(written: str, canonical: str) -> None:
    order = decode_order(sample_with(date_created=written))
    assert order_to_plain(order)["date_created"] == canonical


class RepeatedHour(dt.tzinfo):
    """A time zone in the hour that its clocks repeat."""

    def utcoffset(self, when: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(hours=1 if when is not None and when.fold else 2)

    def dst(self, _when: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(0)

    def tzname(self, _when: dt.datetime | None) -> str:
        return "repeated hour"


@pytest.mark.parametrize("fold", [0, 1])
def test_an_order_of_a_repeated_hour_equals_what_is_read_back(fold: int) -> None:
    made = dt.datetime(2024, 10, 27, 2, 30, fold=fold, tzinfo=RepeatedHour())
    order = attrs.evolve(SAMPLE_ORDER, date_created=made)
    again = decode_order(encode_order(order))
    assert again == order
    assert hash(again) == hash(order)


@pytest.mark.parametrize("data", [SAMPLE.decode(), bytearray(SAMPLE), None, json.loads(SAMPLE)])
def test_only_bytes_are_decoded(data: Any) -> None:
    with pytest.raises(TypeError, match=f"must be bytes, not {type(data).__name__}"):
        decode_order(data)


@pytest.mark.parametrize("part", ["", "delivery", "payment", "items"])
def test_unknown_fields_are_ignored_whatever_they_contain(part: str) -> None:
    holder = f'"{part}":[{{' if part == "items" else f'"{part}":{{' if part else "{"
    for unknown in (
        rb"null",
        rb'"\ud800\u0000"',
        rb"1e400",
        b"9" * 5000,
        rb'{"a":[{}]}',
        rb'"\\u0000"',
        b"[" * 97 + b"]" * 97,
    ):
        for key in (rb"later", "ключ".encode(), rb"\udfff", rb"\u0000", b""):
            data = SAMPLE.replace(holder.encode(), holder.encode() + b'"%b":%b,' % (key, unknown), 1)
            assert decode_order(data) == SAMPLE_ORDER


def test_the_last_value_of_a_repeated_key_counts_even_if_an_earlier_one_is_invalid() -> None:
    twice = SAMPLE.replace(b'"sm_id":99', b'"sm_id":"no","sm_id":7,"sm_id":99')
    twice = twice.replace(b'"currency":"USD"', b'"currency":7,"currency":"EUR","currency":"USD"')
    twice = twice.replace(b'{"chrt_id":9934931', b'{"chrt_id":null,"chrt_id":9934931')
    twice = b'{"delivery":[],"payment":{},"items":[],' + twice[1:]
    assert decode_order(twice) == SAMPLE_ORDER
    assert [fault.path for fault in faults_in(SAMPLE.replace(b'"sm_id":99', b'"sm_id":99,"sm_id":"99"'))] == ["$.sm_id"]


def test_a_repeated_key_does_not_replace_a_missing_one() -> None:
    [fault] = faults_in(SAMPLE.replace(b'"entry":"WBIL"', b'"sm_id":99'))
    assert (fault.path, fault.found) == ("$.entry", "no value")


def test_an_escaped_key_equals_the_plain_key() -> None:
    assert decode_order(SAMPLE.replace(b'"order_uid"', rb'"order\u005Fuid"')) == SAMPLE_ORDER


# Faults


@pytest.mark.parametrize("kind", FaultKind)
@given(order=orders(max_items=2), rng=seeds)
@settings(max_examples=10)
def test_one_fault_of_any_kind_is_reported_with_its_path(kind: FaultKind, order: Order, rng: Random) -> None:
    bad = break_order(order, kind, rng)
    with pytest.raises(bad.error) as caught:
        decode_order(bad.data)
    assert ([fault.path for fault in caught.value.faults], caught.value.total) == ([bad.path], 1)


@pytest.mark.parametrize("kind", FaultKind)
def test_no_error_shows_a_value(kind: FaultKind) -> None:
    secret, secret_number = "Zz9secret", 7_654_321
    order = attrs.evolve(
        SAMPLE_ORDER,
        order_uid=secret,
        entry=secret,
        customer_id=secret,
        internal_signature=secret,
        sm_id=secret_number,
        delivery=Delivery(**dict.fromkeys(attrs.fields_dict(Delivery), secret)),
        items=[
            attrs.evolve(item, name=secret, rid=secret, brand=secret, size=secret, price=secret_number)
            for item in SAMPLE_ORDER.items
        ],
    )
    for seed in range(30):
        data = break_order(order, kind, Random(seed)).data
        with pytest.raises(RejectedError) as caught:
            decode_order(data)
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(caught.value.faults)
        assert secret not in shown
        assert str(secret_number) not in shown


def test_faults_are_in_document_order_with_missing_fields_last_in_their_object() -> None:
    plain = json.loads(SAMPLE)
    del plain["track_number"], plain["payment"]["bank"]
    payment = {"amount": None} | plain.pop("payment") | {"amount": -1, "provider": None}
    items = [plain["items"][0], {"brand": 1, "rid": ""}]
    del plain["sm_id"]
    bad = {"payment": payment, "sm_id": True} | plain | {"items": items, "locale": []}
    paths = [fault.path for fault in faults_in(json.dumps(bad).encode())]
    assert paths == [
        "$.payment.amount",
        "$.payment.provider",
        "$.payment.bank",
        "$.sm_id",
        "$.items[1].brand",
        "$.items[1].rid",
        *(
            f"$.items[1].{name}"
            for name in ("chrt_id", "track_number", "price", "name", "sale", "size", "total_price", "nm_id", "status")
        ),
        "$.locale",
        "$.track_number",
    ]


def test_the_first_hundred_faults_are_reported_and_all_are_counted() -> None:
    with pytest.raises(InvalidOrder) as caught:
        decode_order(sample_with(items=[{}] * MAX_ITEMS))
    fields = len(attrs.fields(Item)) - len(defaults_of(Item))
    assert caught.value.total == fields * MAX_ITEMS
    assert len(caught.value.faults) == MAX_FAULTS
    assert caught.value.faults[-1].path == f"$.items[{(MAX_FAULTS - 1) // fields}].chrt_id"
    assert f"(and {fields * MAX_ITEMS - 1} more)" in str(caught.value)


@pytest.mark.parametrize("item", [{}, None, SAMPLE, 1])
def test_too_many_items_are_one_fault(item: object) -> None:
    many = json.loads(item)["items"] if isinstance(item, bytes) else [item]
    [fault] = faults_in(sample_with(items=many * (MAX_ITEMS + 1)))
    assert str(fault) == "$.items: expected an array of 1 to 1,000 values, found an array of more than 1,000 values"


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("sm_id", "99", "expected an integer from 0 to 9223372036854775807, found a string"),
        ("sm_id", True, "expected an integer from 0 to 9223372036854775807, found a boolean"),
        ("sm_id", 1.0, "expected an integer from 0 to 9223372036854775807, found a number that is not an integer"),
        ("sm_id", -1, "expected an integer from 0 to 9223372036854775807, found a smaller integer"),
        ("sm_id", 2**63, "expected an integer from 0 to 9223372036854775807, found a greater integer"),
        ("entry", "x" * 256, "expected a string of 1 to 255 characters, found a string of 256 characters"),
        ("entry", "\0", "expected a string of 1 to 255 characters, found a string with U+0000 or a lone surrogate"),
        ("entry", "\ud800", "expected a string of 1 to 255 characters, found a string with U+0000 or a lone surrogate"),
        ("entry", None, "expected a string of 1 to 255 characters, found null"),
        ("delivery", [], "expected an object, found an array"),
        ("items", {}, "expected an array of 1 to 1,000 values, found an object"),
        ("items", [], "expected an array of 1 to 1,000 values, found an array of 0 values"),
    ],
)
def test_a_fault_says_what_was_expected_and_what_was_found(field: str, value: object, text: str) -> None:
    [fault] = faults_in(sample_with(**{field: value}))
    assert str(fault) == f"$.{field}: {text}"


@pytest.mark.parametrize(
    ("date_created", "found"),
    [
        ("2021-11-26T06:22:19", "a time without an offset"),
        ("2021-11-26", "a string of another form"),
        ("2021-11-26T06:22:60Z", "a string of another form"),
        ("2021-02-29T06:22:19Z", "a string of another form"),
        ("2021-11-26T06:22:19+24:00", "a string of another form"),
        ("2021-11-26T06:22:19Z\n", "a string of another form"),
        ("2021-11-26T06:22:19.5\0Z", "a string with U+0000 or a lone surrogate"),
        ("0000-12-31T23:59:59Z", "a string of another form"),
        ("10000-01-01T00:00:00Z", "a string of another form"),
        ("0001-01-01T00:00:00+00:01", "a time outside these years"),
        ("9999-12-31T23:59:59.999999-00:01", "a time outside these years"),
        ("9999-12-31T23:59:59.9999995Z", "a string of another form"),
        (1637907739, "an integer"),
    ],
)
def test_an_invalid_time_is_reported(date_created: object, found: str) -> None:
    [fault] = faults_in(sample_with(date_created=date_created))
    assert (fault.path, fault.found) == ("$.date_created", found)


# Plain data


@given(orders())
@settings(max_examples=50)
@example(SAMPLE_ORDER)
def test_plain_data_equals_the_canonical_json(order: Order) -> None:
    plain = order_to_plain(order)
    assert json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode() == encode_order(order)
    assert order_from_plain(plain) == order


def test_plain_data_may_contain_times_and_models() -> None:
    plain = order_to_plain(SAMPLE_ORDER) | {
        "date_created": SAMPLE_ORDER.date_created,
        "delivery": SAMPLE_ORDER.delivery,
        "items": SAMPLE_ORDER.items,
    }
    assert order_from_plain(plain) == SAMPLE_ORDER


def test_plain_data_from_python_is_as_strict_as_json() -> None:
    naive = SAMPLE_ORDER.date_created.replace(tzinfo=None)
    for bad, found in (
        ({"date_created": naive}, "a time without an offset"),
        ({"sm_id": 99.0}, "a number that is not an integer"),
        ({"sm_id": b"99"}, "a Python bytes"),
        ({"entry": Random}, "a Python type"),
        ({"date_created": "2021-11-26T06:22:19\ud800Z"}, "a string with U+0000 or a lone surrogate"),
    ):
        with pytest.raises(InvalidOrder) as caught:
            order_from_plain({**json.loads(SAMPLE), **bad})
        assert [fault.found for fault in caught.value.faults] == [found]


@pytest.mark.parametrize("kind", FaultKind)
def test_plain_data_has_the_same_fault_report_as_its_json(kind: FaultKind) -> None:
    for seed in range(20):
        data = break_order(SAMPLE_ORDER, kind, Random(seed)).data
        assert comparable(order_or_error(decode_order, data)) == comparable(order_or_error(reference_decode, data))


# cattrs


@attrs.frozen
class Basket:
    """A class of a user, with orders and times."""

    orders: list[Order]
    opened: dt.datetime


@pytest.fixture
def converter() -> cattrs.Converter:
    made = cattrs.Converter()
    orderlib.register_order_hooks(made)
    return made


def test_a_cattrs_converter_with_the_hooks_converts_both_ways(converter: cattrs.Converter) -> None:
    assert converter.unstructure(SAMPLE_ORDER) == order_to_plain(SAMPLE_ORDER)
    assert converter.structure(order_to_plain(SAMPLE_ORDER), Order) == SAMPLE_ORDER
    for part in (SAMPLE_ORDER.delivery, SAMPLE_ORDER.payment, SAMPLE_ORDER.items[0]):
        assert converter.structure(converter.unstructure(part), type(part)) == part


def test_the_hooks_do_not_change_other_classes_of_a_converter(converter: cattrs.Converter) -> None:
    converter.register_unstructure_hook(dt.datetime, dt.datetime.timestamp)
    basket = converter.unstructure(Basket([SAMPLE_ORDER], SAMPLE_ORDER.date_created))
    assert basket == {"orders": [order_to_plain(SAMPLE_ORDER)], "opened": SAMPLE_ORDER.date_created.timestamp()}


@pytest.mark.parametrize(
    "kind", [kind for kind in FaultKind if kind not in {FaultKind.MANY_DIGITS, FaultKind.TOO_DEEP}]
)
def test_a_cattrs_converter_with_the_hooks_reports_the_same_faults_as_the_decoder(
    kind: FaultKind, converter: cattrs.Converter
) -> None:
    for seed in range(10):
        data = break_order(SAMPLE_ORDER, kind, Random(seed)).data
        found = order_or_error(decode_order, data)
        if not isinstance(found, MalformedJson):
            assert comparable(
                order_or_error(lambda data: converter.structure(json.loads(data), Order), data)
            ) == comparable(found)


@pytest.mark.parametrize("model", [Delivery, Payment, Item])
def test_the_paths_of_a_part_begin_at_the_part(model: type[attrs.AttrsInstance], converter: cattrs.Converter) -> None:
    with pytest.raises(InvalidOrder) as caught:
        converter.structure({}, model)
    required = [field.name for field in attrs.fields(model) if field.name not in defaults_of(model)]
    assert [fault.path for fault in caught.value.faults] == [f"$.{name}" for name in required]


def test_a_fault_inside_a_class_of_a_user_has_its_complete_report(converter: cattrs.Converter) -> None:
    bad: Mapping[str, object] = {"orders": [{**json.loads(SAMPLE), "sm_id": "99"}], "opened": SAMPLE_ORDER.date_created}
    converter.register_structure_hook(dt.datetime, lambda value, _: value)
    with pytest.raises(cattrs.ClassValidationError) as wrapped:
        converter.structure(bad, Basket)
    found = wrapped.value.split(InvalidOrder)[0]
    assert found is not None
    [within_list] = found.exceptions
    assert isinstance(within_list, cattrs.IterableValidationError)
    [refusal] = within_list.exceptions
    assert isinstance(refusal, InvalidOrder)
    assert [fault.path for fault in refusal.faults] == ["$.sm_id"]


# The order_uid alone


@pytest.mark.parametrize(
    ("value", "order_uid"),
    [
        (SAMPLE, "b563feb7b2b84b6test"),
        (b'{"order_uid":"a:b.c_d-E","items":null}', "a:b.c_d-E"),
        (b'{"order_uid":"first","order_uid":"last"}', "last"),
        (b'{"order_uid":5,"order_uid":"last"}', "last"),
        (b'{"order_uid":"first","order_uid":5}', None),
        (b'{"order_uid":"x","unknown":"\\ud800"}', "x"),
        (b'{"order_uid":"x","deep":' + b"[" * 500 + b"]" * 500 + b"}", "x"),
        (b"", None),
        (b"null", None),
        (b"[]", None),
        (b"{}", None),
        (b'{"order_uid":7}', None),
        (b'{"order_uid":""}', None),
        (b'{"order_uid":"two words"}', None),
        (b'{"order_uid":"' + b"x" * 129 + b'"}', None),
        (b'{"order_uid":"\\ud800"}', None),
        (b'{"order_uid":"\xff"}', None),
        (b'{"order_uid":"x"', None),
        (b'{"order_uid":"x"} and more', None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
def test_the_order_uid_is_read_from_any_text_that_has_a_valid_one(value: bytes, order_uid: str | None) -> None:
    assert read_order_uid(value) == order_uid
