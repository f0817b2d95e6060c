"""What the new fields of CONTRIBUTING.md must do. It runs in a copy of the project that has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

import jsonschema
import pytest

from orderlib import InvalidOrder, content_sha256, decode_order, encode_order, json_schema, order_to_plain
from orderlib.codecs import decode_canonical, digest
from orderlib.testing import SAMPLE, FaultKind, break_order, make_item, make_order, make_payment
from tests.support.api_process import serving
from tests.support.programs import succeed

SAMPLE_ORDER = decode_order(SAMPLE)

#: The fields by their paths in the sample, with their defaults and other values.
DEFAULTS = {"$.gift_note": "", "$.payment.points": 0, "$.items[0].unit": "piece", "$.items[1].unit": "piece"}
OTHERS = {"$.gift_note": "Happy birthday", "$.payment.points": 70, "$.items[0].unit": "box", "$.items[1].unit": "m"}


def part(plain: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the object in which a field is, and its name."""
    _, *parents, name = path.split(".")
    for parent in parents:
        key, _, index = parent.rstrip("]").partition("[")
        plain = plain[key][int(index)] if index else plain[key]
    return plain, name


def sample_with(values: Mapping[str, object]) -> bytes:
    """Return the JSON of the sample with these values, by path. New fields come first in their objects."""
    plain = json.loads(SAMPLE)
    for path, value in values.items():
        holder, name = part(plain, path)
        others = dict(holder)
        holder.clear()
        holder.update({name: value} | others)
    return json.dumps(plain).encode()


def value_at(plain: dict[str, Any], path: str) -> object:
    holder, name = part(plain, path)
    return holder.get(name)


def test_a_field_that_equals_its_default_is_omitted_and_changes_no_digest() -> None:
    explicit = sample_with(DEFAULTS)
    assert decode_order(explicit) == SAMPLE_ORDER
    assert encode_order(decode_order(explicit)) == encode_order(SAMPLE_ORDER)
    assert not {"gift_note", "points", "unit"} & set(encode_order(SAMPLE_ORDER).decode().split('"'))
    assert digest(*decode_canonical(explicit)) == digest(*decode_canonical(SAMPLE)) == content_sha256(SAMPLE_ORDER)


@pytest.mark.parametrize("path", OTHERS)
def test_another_value_is_part_of_the_content(path: str) -> None:
    written = sample_with({path: OTHERS[path]})
    order = decode_order(written)
    assert order != SAMPLE_ORDER
    assert content_sha256(order) == digest(*decode_canonical(written)) != content_sha256(SAMPLE_ORDER)
    assert value_at(order_to_plain(order), path) == OTHERS[path]
    assert encode_order(order) == sample_canonical_with(path)


def sample_canonical_with(path: str) -> bytes:
    """Return canonical JSON in which the new field is the last one of its object."""
    plain = json.loads(encode_order(SAMPLE_ORDER))
    holder, name = part(plain, path)
    holder[name] = OTHERS[path]
    return json.dumps(plain, separators=(",", ":")).encode()


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("value", [None, [], "x" * 1001, -1, 1.0, "\0"])
def test_an_invalid_value_is_a_fault_with_its_path(path: str, value: object) -> None:
    with pytest.raises(InvalidOrder) as caught:
        decode_order(sample_with({path: value}))
    assert [fault.path for fault in caught.value.faults] == [path]


def test_new_fields_can_have_every_fault_but_can_be_missing() -> None:
    order = decode_order(sample_with(OTHERS))
    for original in (order, SAMPLE_ORDER):
        broken = {break_order(original, FaultKind.NULL, Random(seed)).path for seed in range(1500)}
        assert OTHERS.keys() <= broken
        missing = {break_order(original, FaultKind.MISSING, Random(seed)).path for seed in range(300)}
        assert not OTHERS.keys() & missing


def test_the_json_schema_has_the_default_of_a_field_that_is_not_required() -> None:
    schema = json_schema()
    for name, model in (("gift_note", "Order"), ("points", "Payment"), ("unit", "Item")):
        assert name not in schema["$defs"][model]["required"]
    assert schema["$defs"]["Item"]["properties"]["unit"]["default"] == "piece"
    assert schema["$defs"]["Order"]["properties"]["gift_note"]["default"] == ""
    validator = jsonschema.Draft202012Validator(schema)
    for path, value in OTHERS.items():
        assert validator.is_valid(json.loads(sample_with({path: value})))
        assert not validator.is_valid(json.loads(sample_with({path: None})))


def test_factories_take_the_new_fields() -> None:
    order = make_order(gift_note="Hello", payment=make_payment(points=3), items=[make_item(unit="box"), make_item()])
    plain = order_to_plain(order)
    assert (plain["gift_note"], plain["payment"]["points"]) == ("Hello", 3)
    assert [item.get("unit") for item in plain["items"]] == ["box", None]


def test_new_fields_go_from_kafka_to_the_api_and_its_page(environ: dict[str, str]) -> None:
    plain = json.loads(sample_with(OTHERS))
    sent = [SAMPLE, json.dumps({**plain, "order_uid": "new"}).encode()]
    succeed("sender --file -", environ, stdin=b"\n".join(sent))
    succeed("consumer --exit-at-end", environ)
    with serving(environ) as api:
        assert api.get(f"/orders/{SAMPLE_ORDER.order_uid}").body == encode_order(SAMPLE_ORDER)
        assert api.get("/orders/new").body == encode_order(decode_order(sent[1]))
        page = api.page("/orders/new").text
        for shown in (
            "<dt>Gift note</dt><dd><bdi>Happy birthday",
            "<dt>Points</dt><dd><bdi>70",
            ">Unit</th>",
            'data-name="Unit"><bdi>box',
        ):
            assert shown in page
        assert 'data-name="Unit"><bdi>piece' in api.page(f"/orders/{SAMPLE_ORDER.order_uid}").text
        schemas = api.get("/openapi.json").json["components"]["schemas"]
        assert schemas["Payment"]["properties"]["points"] == {
            "type": "integer",
            "minimum": 0,
            "maximum": 1_000_000,
            "default": 0,
            "description": "Loyalty points that were spent.",
        }
    assert json.loads(succeed("admin reconcile --json", environ))["holds"]
