"""``orderlib.testing``, which the tests of users and the sender use."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import find, given, settings
from msgspec.inspect import DataclassType, VarTupleType

from orderlib import InvalidOrder, MalformedJson, Order, Payment, decode_order
from orderlib.contract import field_rules, rule_of, rules_of
from orderlib.testing import (
    SAMPLE,
    BadRecord,
    FaultKind,
    break_order,
    make_delivery,
    make_item,
    make_order,
    make_orders,
    make_payment,
)
from orderlib.testing.strategies import orders, payments, values

SAMPLE_ORDER = decode_order(SAMPLE)
RULES = field_rules(Order)


def test_the_sample_is_an_order() -> None:
    assert json.loads(SAMPLE)["order_uid"] == SAMPLE_ORDER.order_uid == "b563feb7b2b84b6test"


def test_the_sample_is_shipped_with_the_library() -> None:
    assert (Path(__file__).parents[2] / "orderlib" / "testing" / "sample.json").read_bytes() == SAMPLE


@pytest.mark.parametrize("kind", FaultKind)
def test_bad_orders_depend_on_the_seed_alone(kind: FaultKind) -> None:
    def some(seed: int) -> list[BadRecord]:
        rng = Random(seed)
        return [break_order(SAMPLE_ORDER, kind, rng) for _ in range(20)]

    assert some(7) == some(7)
    # Some kinds have only one bad record.
    only_one = {FaultKind.TOO_MANY_ITEMS, FaultKind.NO_ITEMS, FaultKind.WITHOUT_OFFSET, FaultKind.BYTE_ORDER_MARK}
    assert (some(7) == some(8)) == (kind in only_one)


@pytest.mark.parametrize("kind", FaultKind)
def test_breaking_an_order_does_not_change_the_order(kind: FaultKind) -> None:
    break_order(SAMPLE_ORDER, kind, Random(1))
    assert decode_order(SAMPLE) == SAMPLE_ORDER


def test_every_field_and_every_item_can_have_the_fault() -> None:
    rng = Random(1)
    broken = {break_order(SAMPLE_ORDER, FaultKind.NULL, rng).path for _ in range(3000)}
    assert broken == set(paths(rules_of(Order), "$"))


def paths(rule: DataclassType, path: str) -> list[str]:
    """The path of each value in the sample."""
    found = []
    for field in rule.fields:
        here = f"{path}.{field.name}"
        found.append(here)
        match rule_of(field):
            case DataclassType() as part:
                found += paths(part, here)
            case VarTupleType(item_type=DataclassType() as item):
                for index in range(len(SAMPLE_ORDER.items)):
                    found += [f"{here}[{index}]", *paths(item, f"{here}[{index}]")]
    return found


def test_bad_records_raise_both_errors() -> None:
    rng = Random(1)
    errors = {kind: break_order(SAMPLE_ORDER, kind, rng).error for kind in FaultKind}
    assert errors[FaultKind.TOO_DEEP] is MalformedJson
    assert errors[FaultKind.TOO_LONG] is InvalidOrder


@given(orders(max_items=2))
@settings(max_examples=25)
def test_no_more_items_are_drawn_than_asked_for(order: Order) -> None:
    assert 1 <= len(order.items) <= 2


def test_strategies_reach_the_bounds() -> None:
    assert find(values(RULES["sm_id"]), lambda number: number == 2**63 - 1) == 2**63 - 1
    assert find(values(RULES["shardkey"]), lambda text: not text) == ""
    assert find(values(RULES["entry"]), lambda text: isinstance(text, str) and len(text) == 255)
    assert find(values(RULES["date_created"]), lambda time: isinstance(time, dt.datetime) and bool(time.utcoffset()))


@given(payments())
@settings(max_examples=25)
def test_drawn_texts_have_the_form_of_their_rule(payment: Payment) -> None:
    assert re.fullmatch("[A-Z]{3}", payment.currency)


def test_every_order_of_a_factory_is_another_one() -> None:
    orders = [make_order() for _ in range(100)] + make_orders(100) + make_orders(100, seed=1)
    assert len({order.order_uid for order in orders}) == 300
    assert len({order.payment.amount for order in orders}) > 200


def test_a_seed_makes_the_same_orders_and_parts_again() -> None:
    for make in (make_order, make_delivery, make_payment, make_item):
        assert make(seed=7) == make(seed=7)
        assert make(seed=7) != make(seed=8)
        assert make() != make()
    assert make_orders(3, seed=7) == make_orders(3, seed=7)
    assert make_orders(5, seed=7)[:3] == make_orders(3, seed=7)
    assert make_order(seed=7).order_uid == "order-7"


def test_the_fields_that_are_given_count_and_the_others_stay() -> None:
    order = make_order(seed=7, customer_id="c1", items=[make_item(total_price=300), make_item(total_price=200)])
    assert (order.customer_id, order.payment.goods_total) == ("c1", 500)
    assert order.payment.amount == 500 + order.payment.delivery_cost
    assert order.delivery == make_order(seed=7).delivery
    assert make_order(payment=make_payment(amount=5)).payment.amount == 5
    assert {order.customer_id for order in make_orders(3, customer_id="c1")} == {"c1"}
    assert make_order(order_uid="a").payment.transaction == "a"


def test_factories_refuse_what_no_order_can_have() -> None:
    with pytest.raises(InvalidOrder, match=r"\$.sm_id"):
        make_order(sm_id=-1)
    with pytest.raises(InvalidOrder, match=r"\$.items"):
        make_order(items=[])
    with pytest.raises(TypeError, match="customer"):
        make_order(customer="c1")
