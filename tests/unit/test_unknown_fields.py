"""Fields that orderlib does not know: the known fields stay equal, and the others are part of the content."""

from __future__ import annotations

import hashlib
import itertools
import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orderlib import Order, content_sha256, decode_order, encode_order, order_to_plain
from orderlib.codecs import read_order_uid, unknown_fields
from orderlib.ingestion.records import PreparedOrder
from orderlib.testing import SAMPLE
from orderlib.testing.strategies import orders

SAMPLE_ORDER = decode_order(SAMPLE)
RECORD = encode_order(SAMPLE_ORDER)

#: A JSON text as its tokens. Whitespace may stand between them.
Tokens = tuple[str, ...]
#: Unknown fields: the tokens of each value by name (as JSON), by the path of the object that has them.
Unknown = dict[str, dict[str, Tokens]]

NAMES = ["later", "", "a b", "ж", "order_uid ", "name\0", "\ud800", "\udfff", "\ufffd", "$", "x.y", "x[0]"]
SCALARS = ["1", "1.0", "-0", "1e400", "9" * 5000, "null", "true", '""', '" "', '"\\ud800"', '"\\u0000"', '"\\\\u0000"']
SPACE = ["", "", " ", "\t", "\r\n"]

seeds = st.integers(0, 2**32 - 1).map(Random)


def tokens() -> st.SearchStrategy[Tokens]:
    """Return a strategy for JSON values."""

    def containers(parts: st.SearchStrategy[Tokens]) -> st.SearchStrategy[Tokens]:
        arrays = st.lists(parts, max_size=3).map(lambda values: ("[", *_separated(values), "]"))
        members = st.tuples(st.sampled_from(NAMES), parts).map(lambda pair: (json.dumps(pair[0]), ":", *pair[1]))
        return arrays | st.lists(members, max_size=3).map(lambda found: ("{", *_separated(found), "}"))

    return st.recursive(st.sampled_from(SCALARS).map(lambda text: (text,)), containers, max_leaves=5)


def _separated(parts: list[Tokens]) -> Tokens:
    return tuple(itertools.chain.from_iterable((",", *part) if index else part for index, part in enumerate(parts)))


def unknown() -> st.SearchStrategy[Unknown]:
    """Return a strategy for unknown fields at every level of the sample, at least one."""
    fields = st.dictionaries(st.sampled_from(NAMES), tokens(), min_size=1, max_size=3)
    return st.dictionaries(st.sampled_from(["$", "$.delivery", "$.payment", "$.items[0]"]), fields, min_size=1)


def written(order: Order, unknown: Unknown, rng: Random) -> bytes:
    """Return JSON of an order with unknown fields: members in any sequence, any whitespace, escapes in names."""

    def space() -> str:
        return rng.choice(SPACE)

    def text(value: Any, path: str) -> str:
        if isinstance(value, list):
            return f"[{','.join(space() + text(part, f'{path}[{index}]') for index, part in enumerate(value))}]"
        if not isinstance(value, dict):
            return json.dumps(value, ensure_ascii=rng.random() < 0.5)
        members = [(json.dumps(name), text(part, f"{path}.{name}")) for name, part in value.items()]
        for name, value_tokens in unknown.get(path, {}).items():
            escaped = "".join(f"\\u{ord(char):04x}" for char in name) if rng.random() < 0.5 else json.dumps(name)[1:-1]
            members.append((f'"{escaped}"', "".join(space() + token for token in value_tokens)))
        rng.shuffle(members)
        return "{" + ",".join(f"{space()}{name}{space()}:{value}{space()}" for name, value in members) + "}"

    return (space() + text(order_to_plain(order), "$") + space()).encode()


@given(unknown(), unknown(), seeds)
@settings(max_examples=100)
def test_unknown_fields_are_content_and_change_no_known_field(first: Unknown, second: Unknown, rng: Random) -> None:
    texts = [written(SAMPLE_ORDER, fields, rng) for fields in (first, first, second)]
    prepared = [PreparedOrder.of_text(text) for text in texts]
    assert [decode_order(text) for text in texts] == [SAMPLE_ORDER] * 3
    assert {read_order_uid(text) for text in texts} == {SAMPLE_ORDER.order_uid}
    assert [prepared_order.original for prepared_order in prepared] == texts
    one, same, other = [prepared_order.content_sha256 for prepared_order in prepared]
    assert one == same != content_sha256(SAMPLE_ORDER)
    assert (one == other) == (first == second)


@given(orders(), seeds)
@settings(max_examples=20)
def test_an_order_without_unknown_fields_has_no_original_and_the_digest_of_its_known_fields(
    order: Order, rng: Random
) -> None:
    prepared = PreparedOrder.of_text(written(order, {}, rng))
    assert (prepared.original, prepared.content_sha256) == (None, content_sha256(order))


def with_member(member: bytes) -> bytes:
    """Return the sample with one more member in its object and in its first item."""
    return RECORD.replace(b'"sm_id":99', member + b',"sm_id":99').replace(b'"chrt_id"', member + b',"chrt_id"', 1)


def test_digests_of_orders_with_unknown_fields_never_change() -> None:
    """They are stored, and they are ETags."""
    prepared = PreparedOrder.of_text(with_member(b' "later" : [ 1.50, "\\u00e9" ], "earlier":1'))
    fields = b'["earlier",1]\n["later",[1.50,"\\u00e9"]]'
    covered = RECORD + b'"$"\n%b\n"$.items[0]"\n%b' % (fields, fields)
    assert prepared.content_sha256 == hashlib.sha256(covered).digest()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(RECORD.replace(b'"sm_id":99', b'"sm_id":"x","sm_id":99'), id="a field"),
        pytest.param(RECORD.replace(b'"delivery":', b'"delivery":{"later":1},"delivery":'), id="an object"),
        pytest.param(RECORD.replace(b'"items":', b'"items":[{"later":1}],"items":'), id="an array"),
    ],
)
def test_the_last_one_of_a_repeated_name_decides_whether_there_are_unknown_fields(data: bytes) -> None:
    prepared = PreparedOrder.of_text(data)
    assert (prepared.original, prepared.content_sha256) == (None, content_sha256(SAMPLE_ORDER))


def test_of_an_unknown_field_that_is_repeated_the_last_value_counts() -> None:
    once, twice = with_member(b'"later":2'), with_member(b'"later":1,"later":2')
    assert PreparedOrder.of_text(twice).content_sha256 == PreparedOrder.of_text(once).content_sha256


def test_names_that_no_text_of_postgresql_can_have_are_different_names() -> None:
    names = [rb"\ud800", rb"\ud801", rb"\udc00", rb"\u0000", rb"\u00000000", rb"\u0000d800", rb"\\ud800", rb"\ufffd"]
    digests = {PreparedOrder.of_text(with_member(b'"%b":1' % name)).content_sha256 for name in names}
    assert len(digests) == len(names)


def test_unknown_fields_are_named_by_the_path_of_their_object() -> None:
    found = unknown_fields(with_member(b'"gift" : {"wrap": true}'))
    assert {path: {name: bytes(value) for name, value in fields.items()} for path, fields in found.items()} == {
        "$": {"gift": b'{"wrap": true}'},
        "$.items[0]": {"gift": b'{"wrap": true}'},
    }
