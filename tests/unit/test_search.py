"""What the text of a search can mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.inspect import StrType

from orderlib.contract import field_rules
from orderlib.models import Delivery, Item, Order
from orderlib.search import MAX_CHARS, SearchText


def parsed_uid(text: str) -> str | None:
    search = SearchText.parse(text)
    return search.order_uid if search else None


def test_no_field_of_a_search_is_longer_than_a_text_that_is_parsed() -> None:
    fields = [
        *(field_rules(Order)[name] for name in ("order_uid", "track_number", "customer_id")),
        *(field_rules(Delivery)[name] for name in ("phone", "email")),
        field_rules(Item)["rid"],
    ]
    for rule in fields:
        assert isinstance(rule, StrType)
        assert rule.max_length is not None
        # A URL may have each character of an order_uid as %XX.
        assert 3 * rule.max_length < MAX_CHARS
    assert SearchText.parse("x" * MAX_CHARS) is not None
    assert SearchText.parse(f"  {'x' * (MAX_CHARS + 1)}") is None


def test_the_longest_order_uid_is_found_in_a_url() -> None:
    uid = "a-" * 64
    for host in ("https://orders.example", f"https://{'host.' * 50}example/{'path/' * 100}"):
        assert parsed_uid(f" {host}/orders/{uid.replace('-', '%2D')}?view=items#top ") == uid


@pytest.mark.parametrize(
    ("text", "order_uid"),
    [
        ("/orders/a/orders/b", "b"),
        ("/orders/a/orders/", "a"),
        ("/orders/a/orders/?x", "a"),
        ("/orders//orders/?x", None),
        ("x/orders/a", "a"),
        ("orders/a", None),
        ("/orders/a b", None),
        ("b /orders/a", None),
        ("b\u2003/orders/a", None),
        ("/orders/a%20b", None),
    ],
)
def test_the_last_order_in_a_url_counts_and_white_space_makes_it_no_url(text: str, order_uid: str | None) -> None:
    assert parsed_uid(text) == order_uid


@pytest.mark.timeout(20)
@given(
    st.lists(st.sampled_from(["/orders/", "x", "/", " ", "?", "%", "%41", "1", "\n", "\u3000"]), min_size=1),
    st.integers(1, 1_000_000),
)
def test_any_text_repeated_any_number_of_times_is_parsed_at_once(parts: list[str], times: int) -> None:
    text = "".join(parts)
    for end in ("", "y", " y"):
        SearchText.parse((text * times)[:1_000_000] + end)
        SearchText.parse((text * times)[: MAX_CHARS - 2] + end)
