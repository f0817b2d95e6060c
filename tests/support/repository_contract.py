"""What every OrderRepository promises. Subclass it and give it a ``repository`` that is empty."""

from __future__ import annotations

import datetime as dt
import enum
import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, Protocol

import attrs
import pytest

from orderlib import (
    Cursor,
    Direction,
    Item,
    Match,
    Order,
    OrderNotFound,
    OrderRepository,
    Outcome,
    PositionState,
    RecordState,
    SearchField,
    StoredOrder,
    content_sha256,
    decode_order,
    encode_order,
)
from orderlib.errors import REJECT_CODES, Fault, InvalidOrder, InvalidQuery, RejectedError
from orderlib.repository import STREAM_SIZE
from orderlib.testing import SAMPLE

SAMPLE_ORDER = decode_order(SAMPLE)

#: Texts that cannot be the order_uid of a stored order.
STRANGE_UIDS = ["", ".", "a\0b", "\ud800", "x" * 10_000, "'; DROP TABLE orders; --", "ключ", "b563feb7b2b84b6test "]


def an_order(
    order_uid: str, version: int = 0, *, customer_id: str = "c", track_number: str = "t", items: int = 2
) -> Order:
    """Return an order whose row in each table shows the version."""
    [item] = SAMPLE_ORDER.items[:1]
    return attrs.evolve(
        SAMPLE_ORDER,
        order_uid=order_uid,
        customer_id=customer_id,
        track_number=track_number,
        sm_id=version,
        delivery=attrs.evolve(SAMPLE_ORDER.delivery, name=f"version {version}"),
        payment=attrs.evolve(SAMPLE_ORDER.payment, amount=version),
        items=[attrs.evolve(item, chrt_id=line, price=version) for line in range(items)],
    )


def with_unknown(order_uid: str, value: bytes) -> bytes:
    """Return the JSON text of ``an_order`` with an unknown field of this value."""
    return encode_order(an_order(order_uid))[:-1] + b', "later": ' + value + b"}"


def versions_in(order: Order) -> set[int]:
    """Return the versions of the parts of ``an_order``; more than one is a mixture."""
    of_items = {item.price for item in order.items}
    return {order.sm_id, int(order.delivery.name.removeprefix("version ")), order.payment.amount, *of_items}


def reached_at(order_uid: str, phone: str, email: str, *, customer_id: str = "c") -> Order:
    """Return an order with this phone number and e-mail address."""
    delivery = attrs.evolve(SAMPLE_ORDER.delivery, phone=phone, email=email)
    return attrs.evolve(an_order(order_uid, customer_id=customer_id), delivery=delivery)


class Stamp(dt.datetime):
    """A time of a library or of a test."""


def stored(repository: OrderRepository, order_uid: str) -> StoredOrder:
    [found] = [stored for stored in repository.list_orders(limit=100).orders if stored.order.order_uid == order_uid]
    return found


def uids(page_orders: tuple[StoredOrder, ...]) -> list[str]:
    return [stored.order.order_uid for stored in page_orders]


class RepositoryContract:
    """The contract of ``OrderRepository``, except streams and positions."""

    # One order

    def test_an_order_is_read_back_as_it_was_saved(self, repository: OrderRepository) -> None:
        assert repository.save(SAMPLE_ORDER) is Outcome.STORED
        assert repository.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER

    def test_orders_at_the_edges_of_the_contract_are_read_back_as_they_were_saved(
        self, repository: OrderRepository
    ) -> None:
        east, west = (dt.timezone(dt.timedelta(minutes=minutes)) for minutes in (1439, -1439))
        first = dt.datetime.min.replace(tzinfo=dt.UTC)
        last = dt.datetime.max.replace(tzinfo=dt.UTC)
        edges = [
            attrs.evolve(an_order(uid, items=items), date_created=time, sm_id=2**63 - 1, internal_signature=text)
            for uid, time, items, text in (
                ("a", first, 1, "\U0010ffff" * 4096),
                ("b" * 128, last, 1000, ""),
                (":", first.astimezone(east), 1, "\x01\x7f\ufeff\ufffe\\N\t\n"),
                ("...", last.astimezone(west), 1, "\u0301é\u202e"),
            )
        ]
        repository.save_many(edges)
        assert repository.get_many(order.order_uid for order in edges) == {order.order_uid: order for order in edges}

    def test_times_are_read_back_in_utc(self, repository: OrderRepository) -> None:
        east = dt.datetime(2026, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5)))
        repository.save(attrs.evolve(SAMPLE_ORDER, date_created=east))
        found = repository.get(SAMPLE_ORDER.order_uid).date_created
        assert (found, found.tzinfo) == (east, dt.UTC)

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_time_may_be_of_a_subclass_that_may_replace_the_class(
        self, repository: OrderRepository, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
    ) -> None:
        """Tests that choose the time replace the class, and get times of it from ``now``."""
        plain_class = dt.datetime
        with monkeypatch.context() as patch:
            if replaced:
                patch.setattr("datetime.datetime", Stamp)
            order = attrs.evolve(SAMPLE_ORDER, date_created=Stamp(2026, 1, 1, tzinfo=dt.UTC))
            assert repository.save(order) is Outcome.STORED
            found = repository.get_stored(order.order_uid)
            for since in (found.first_stored_at, Stamp(2000, 1, 1, tzinfo=dt.UTC)):
                assert repository.list_orders(since=since).orders == (found,)
            assert repository.list_orders(cursor=Cursor.parse(str(found.cursor))).orders == ()
            assert repository.count(until=Stamp(2000, 1, 1, tzinfo=dt.UTC)) == 0
            assert repository.save(attrs.evolve(found.order, sm_id=1)) is Outcome.STORED
            assert repository.stats().stored_recently == 1
        assert found.order == order
        times = (order.date_created, found.order.date_created, found.first_stored_at, found.cursor.first_stored_at)
        assert {type(time) for time in times} == {plain_class}

    def test_an_order_that_is_not_there_is_not_found(self, repository: OrderRepository) -> None:
        repository.save(SAMPLE_ORDER)
        for order_uid in STRANGE_UIDS:
            with pytest.raises(OrderNotFound):
                repository.get(order_uid)
            with pytest.raises(OrderNotFound):
                repository.get_stored(order_uid)
            with pytest.raises(OrderNotFound):
                repository.content_sha256(order_uid)
            with pytest.raises(OrderNotFound):
                repository.original(order_uid)

    def test_the_text_of_an_order_with_unknown_fields_is_kept_byte_for_byte(self, repository: OrderRepository) -> None:
        large = b'"' + b"x" * 5_000_000 + b'"'
        for text in (with_unknown("a", b"null"), with_unknown("b", rb'"\ud800\u0000"'), with_unknown("c", large)):
            order = decode_order(text)
            assert repository.save(order, original=text) is Outcome.STORED
            assert repository.get(order.order_uid) == order
            assert repository.original(order.order_uid) == text
            assert repository.get_stored(order.order_uid).has_original
        assert [found.has_original for found in repository.list_orders().orders] == [True] * 3

    def test_an_order_without_unknown_fields_has_no_original(self, repository: OrderRepository) -> None:
        assert repository.save(SAMPLE_ORDER, original=SAMPLE) is Outcome.STORED
        assert repository.original(SAMPLE_ORDER.order_uid) is None
        assert stored(repository, SAMPLE_ORDER.order_uid) == repository.get_stored(SAMPLE_ORDER.order_uid)
        assert not stored(repository, SAMPLE_ORDER.order_uid).has_original
        assert repository.content_sha256(SAMPLE_ORDER.order_uid) == content_sha256(SAMPLE_ORDER)

    def test_unknown_fields_are_part_of_the_content(self, repository: OrderRepository) -> None:
        """For equal content, the first text is kept. The text of a replaced version is removed."""
        order = an_order("a")
        first, respelled, other = (with_unknown("a", value) for value in (b"[1]", b" [ 1 ]", b"[2]"))
        saved: list[tuple[bytes | None, Outcome, bytes | None, int]] = [
            (first, Outcome.STORED, first, 1),
            (respelled, Outcome.DUPLICATE, first, 1),
            (other, Outcome.STORED, other, 2),
            (None, Outcome.STORED, None, 3),
            (first, Outcome.STORED, first, 4),
        ]
        for text, outcome, original, version in saved:
            assert repository.save(order, original=text) is outcome
            assert (repository.original("a"), repository.get_stored("a").version) == (original, version)
        assert repository.content_sha256("a") == repository.get_stored("a").content_sha256 != content_sha256(order)

    def test_the_text_of_another_order_is_refused(self, repository: OrderRepository) -> None:
        with pytest.raises(ValueError, match="original"):
            repository.save(an_order("a", 1), original=with_unknown("a", b"1"))
        with pytest.raises(RejectedError):
            repository.save(an_order("a"), original=b"{}")
        with pytest.raises(TypeError, match=r"original must be bytes, not str$"):
            repository.save(an_order("a"), original="{}")  # type: ignore[arg-type]  # a wrong type
        with pytest.raises(OrderNotFound):
            repository.get("a")

    def test_one_text_is_not_taken_for_several_order_uids(self, repository: OrderRepository) -> None:
        repository.save(an_order("a"))
        with pytest.raises(TypeError, match="several"):
            repository.get_many("a")

    @pytest.mark.parametrize("value", [SAMPLE_ORDER, 5, None])
    def test_one_order_is_not_taken_for_several(self, repository: OrderRepository, value: Any) -> None:
        with pytest.raises(TypeError, match=f"save_many takes several orders, not one {type(value).__name__}"):
            repository.save_many(value)

    def test_the_digest_of_an_order_is_that_of_its_current_content(self, repository: OrderRepository) -> None:
        for order in (an_order("a", 1), an_order("a", 2)):
            repository.save(order)
            assert repository.content_sha256("a") == content_sha256(order)
            assert repository.get_stored("a").content_sha256 == content_sha256(order)
            assert stored(repository, "a") == repository.get_stored("a")

    def test_saving_an_equal_order_again_is_a_duplicate_and_changes_no_field(self, repository: OrderRepository) -> None:
        repository.save(SAMPLE_ORDER)
        before = stored(repository, SAMPLE_ORDER.order_uid)
        elsewhere = SAMPLE_ORDER.date_created.astimezone(dt.timezone(dt.timedelta(hours=9)))
        for equal in (SAMPLE_ORDER, attrs.evolve(SAMPLE_ORDER, date_created=elsewhere)):
            assert repository.save(equal) is Outcome.DUPLICATE
        assert stored(repository, SAMPLE_ORDER.order_uid) == before

    def test_another_version_replaces_an_order_whole(self, repository: OrderRepository) -> None:
        repository.save(an_order("a", 1, items=5))
        before = stored(repository, "a")
        assert repository.save(an_order("a", 2, items=2)) is Outcome.STORED
        after = stored(repository, "a")
        assert after.order == an_order("a", 2, items=2)
        assert after.first_stored_at == before.first_stored_at == before.stored_at
        assert after.stored_at > before.stored_at
        assert (before.version, after.version, after.position) == (1, 2, None)

    def test_versions_count_each_change_of_the_content(self, repository: OrderRepository) -> None:
        repository.save(an_order("a", 1))
        repository.save(an_order("a", 1))
        assert stored(repository, "a").version == 1
        repository.save_many([an_order("a", 2), an_order("a", 1), an_order("b", 1)])
        assert (stored(repository, "a").version, stored(repository, "b").version) == (3, 1)

    def test_an_order_may_go_back_to_an_earlier_version(self, repository: OrderRepository) -> None:
        for version in (1, 2, 1):
            assert repository.save(an_order("a", version)) is Outcome.STORED
        assert repository.get("a") == an_order("a", 1)

    @pytest.mark.parametrize("field", [field.name for field in attrs.fields(Item)])
    def test_a_change_of_any_field_of_an_item_is_another_version(self, repository: OrderRepository, field: str) -> None:
        repository.save(SAMPLE_ORDER)
        first, *others = SAMPLE_ORDER.items
        fields: dict[str, Any] = attrs.asdict(first)
        fields[field] = fields[field] - 1 if isinstance(fields[field], int) else fields[field] + "."
        changed = Item(**fields)
        other = attrs.evolve(SAMPLE_ORDER, items=[changed, *others])
        assert repository.save(other) is Outcome.STORED
        assert repository.get(SAMPLE_ORDER.order_uid) == other

    def test_the_order_of_the_items_is_kept_and_counts(self, repository: OrderRepository) -> None:
        order = an_order("a", items=12)
        backwards = attrs.evolve(order, items=order.items[::-1])
        assert repository.save(order) is Outcome.STORED
        assert repository.save(backwards) is Outcome.STORED
        assert repository.get("a").items == order.items[::-1]

    # Many orders

    def test_of_the_same_order_in_one_call_the_last_version_wins(self, repository: OrderRepository) -> None:
        outcomes = repository.save_many(
            [an_order("a", 1), an_order("b", 1), an_order("a", 2), an_order("a", 2), an_order("c", 1), an_order("c", 2)]
        )
        assert outcomes == Counter({Outcome.STORED: 3, Outcome.SUPERSEDED: 2, Outcome.DUPLICATE: 1})
        assert {uid: versions_in(order) for uid, order in repository.get_many(["a", "b", "c"]).items()} == {
            "a": {2},
            "b": {1},
            "c": {2},
        }

    def test_saving_nothing_does_nothing(self, repository: OrderRepository) -> None:
        assert repository.save_many([]) == Counter()
        assert repository.list_orders().orders == ()

    def test_orders_are_taken_from_any_iterable(self, repository: OrderRepository) -> None:
        outcomes = repository.save_many(an_order(uid) for uid in "abc")
        assert outcomes == Counter({Outcome.STORED: 3})
        assert repository.get_many(iter("abcd")).keys() == set("abc")

    def test_of_many_orders_those_that_exist_are_found(self, repository: OrderRepository) -> None:
        repository.save_many(an_order(uid, items=index + 1) for index, uid in enumerate("abc"))
        assert repository.get_many([]) == {}
        assert repository.get_many(STRANGE_UIDS) == {}
        assert repository.get_many(["c", "a", "c", *STRANGE_UIDS]) == {
            "c": an_order("c", items=3),
            "a": an_order("a", items=1),
        }

    def test_many_orders_are_returned_in_the_sequence_asked_for(self, repository: OrderRepository) -> None:
        names = ["b", "B", "a-b", "a.c", "ab", "A", "_", "10", "9", *(f"{index:03}" for index in range(50))]
        repository.save_many(an_order(uid, items=1) for uid in names)
        rng = Random(8)
        for _ in range(5):
            asked = rng.choices(names, k=40) + STRANGE_UIDS
            rng.shuffle(asked)
            assert list(repository.get_many(asked)) == [uid for uid in dict.fromkeys(asked) if uid in names]

    def test_after_any_calls_the_last_version_of_each_order_is_stored(self, repository: OrderRepository) -> None:
        rng = Random(20211126)
        last: dict[str, Order] = {}
        for _ in range(25):
            batch = [
                an_order(rng.choice("abcdefgh"), rng.randrange(4), items=rng.randint(1, 3))
                for _ in range(rng.choice([1, 1, 5, 20]))
            ]
            assert repository.save_many(batch).total() == len(batch)
            last |= {order.order_uid: order for order in batch}
            assert repository.get_many(list("abcdefgh")) == last

    def test_threads_that_save_the_same_orders_leave_each_of_them_whole(self, repository: OrderRepository) -> None:
        def save(version: int) -> Counter[Outcome]:
            rng = Random(version)
            total: Counter[Outcome] = Counter()
            for _ in range(6):
                chosen = rng.choices("abcdef", k=8)
                total += repository.save_many(an_order(uid, version, items=1 + version) for uid in chosen)
            return total

        with ThreadPoolExecutor(4) as threads:
            outcomes = sum(threads.map(save, range(4)), Counter[Outcome]())
        assert outcomes.total() == 4 * 6 * 8
        found = repository.get_many(list("abcdef"))
        assert found.keys() == set("abcdef")
        for order in found.values():
            [version] = versions_in(order)
            assert len(order.items) == 1 + version

    # The list

    def test_the_list_begins_with_the_order_that_was_stored_last(self, repository: OrderRepository) -> None:
        for uid in "bca":
            repository.save(an_order(uid))
        page = repository.list_orders()
        assert uids(page.orders) == ["a", "c", "b"]
        assert page.next_cursor is None
        assert [stored.order for stored in page.orders] == [an_order(uid) for uid in "acb"]
        assert all(stored.first_stored_at.utcoffset() == dt.timedelta() for stored in page.orders)

    def test_orders_stored_together_are_listed_by_order_uid_backwards(self, repository: OrderRepository) -> None:
        """By code points, with any collation of the database."""
        repository.save_many(an_order(uid) for uid in ("b", "B", "a-b", "a.c", "ab", "A", "_", "10", "9"))
        page = repository.list_orders()
        assert uids(page.orders) == sorted(("b", "B", "a-b", "a.c", "ab", "A", "_", "10", "9"), reverse=True)
        assert len({stored.first_stored_at for stored in page.orders}) == 1

    def test_an_update_does_not_move_an_order(self, repository: OrderRepository) -> None:
        for uid in "abc":
            repository.save(an_order(uid))
        repository.save(an_order("a", 2))
        assert uids(repository.list_orders().orders) == ["c", "b", "a"]

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    def test_following_the_cursors_shows_each_order_once(self, repository: OrderRepository, limit: int) -> None:
        repository.save_many(an_order(uid) for uid in "abc")
        for uid in "defg":
            repository.save(an_order(uid))
        seen: list[str] = []
        cursor: Cursor | None = None
        while True:
            page = repository.list_orders(limit=limit, cursor=cursor)
            assert len(page.orders) <= limit
            seen += uids(page.orders)
            # Meanwhile others are stored and updated.
            repository.save(an_order(f"new-{len(seen)}"))
            repository.save(an_order("b", len(seen)))
            if page.next_cursor is None:
                break
            cursor = Cursor.parse(str(page.next_cursor))
        assert seen == ["g", "f", "e", "d", "c", "b", "a"]

    def test_a_last_page_that_is_full_has_no_next_one(self, repository: OrderRepository) -> None:
        repository.save_many(an_order(uid) for uid in "abcd")
        first = repository.list_orders(limit=2)
        assert first.next_cursor is not None
        assert repository.list_orders(limit=2, cursor=first.next_cursor).next_cursor is None

    def test_a_page_of_newer_orders_ends_just_before_its_cursor(self, repository: OrderRepository) -> None:
        for uid in "abcdefg":
            repository.save(an_order(uid))
        listed = repository.list_orders().orders
        for start, limit in itertools.product(range(7), (1, 2, 7)):
            page = repository.list_orders(cursor=listed[start].cursor, direction=Direction.NEWER, limit=limit)
            assert page.orders == listed[max(0, start - limit) : start]
            assert page.next_cursor == (page.orders[0].cursor if start > limit else None)

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    def test_without_a_cursor_newer_begins_at_the_oldest_order(self, repository: OrderRepository, limit: int) -> None:
        for uid in "abcdefg":
            repository.save(an_order(uid))
        seen: list[str] = []
        page = repository.list_orders(direction=Direction.NEWER, limit=limit)
        while True:
            seen += uids(page.orders)[::-1]
            if page.next_cursor is None:
                break
            page = repository.list_orders(cursor=page.next_cursor, direction=Direction.NEWER, limit=limit)
        assert seen == list("abcdefg")

    def test_a_page_of_very_large_orders_ends_early_and_the_next_goes_on(self, repository: OrderRepository) -> None:
        repository.save_many(an_order(f"large-{number:02}", items=1_000) for number in range(12))
        pages = [repository.list_orders(limit=100)]
        while (cursor := pages[-1].next_cursor) is not None:
            pages.append(repository.list_orders(limit=100, cursor=cursor))
        assert [len(page.orders) for page in pages] == [4, 4, 4]
        assert {len(stored.order.items) for page in pages for stored in page.orders} == {1_000}
        newest_first = [f"large-{number:02}" for number in reversed(range(12))]
        assert [uid for page in pages for uid in uids(page.orders)] == newest_first
        newer = repository.list_orders(limit=100, cursor=pages[2].orders[-1].cursor, direction=Direction.NEWER)
        assert uids(newer.orders) == newest_first[7:11]
        assert newer.next_cursor == newer.orders[0].cursor

    def test_a_page_ends_before_5_000_items_whatever_the_order_uids(self, repository: OrderRepository) -> None:
        large = [an_order(f"b-{number}", items=999) for number in range(5)]
        small = [an_order(f"{prefix}-{number:02}", items=1) for prefix in "ac" for number in range(45)]
        repository.save_many(large)
        repository.save_many(small)
        newest_first = [order.order_uid for order in (*small[::-1], *large[::-1])]
        older = repository.list_orders(limit=100)
        assert uids(older.orders) == newest_first[:94]
        assert [len(stored.order.items) for stored in older.orders] == [1] * 90 + [999] * 4
        assert older.next_cursor == older.orders[-1].cursor
        assert uids(repository.list_orders(limit=100, cursor=older.next_cursor).orders) == newest_first[94:]
        newer = repository.list_orders(limit=100, direction=Direction.NEWER)
        assert uids(newer.orders) == newest_first[-9:]
        assert [len(stored.order.items) for stored in newer.orders] == [1] * 4 + [999] * 5
        assert newer.next_cursor == newer.orders[0].cursor

    def test_filters_are_exact_and_both_hold(self, repository: OrderRepository) -> None:
        for uid, customer_id, track_number in (
            ("a", "one", "x"),
            ("b", "one", "y"),
            ("c", "two", "x"),
            ("d", "One", "x"),
            ("e", "one", "x"),
            ("f", "%", "_"),
        ):
            repository.save(an_order(uid, customer_id=customer_id, track_number=track_number))
        assert uids(repository.list_orders(customer_id="one").orders) == ["e", "b", "a"]
        assert uids(repository.list_orders(track_number="x").orders) == ["e", "d", "c", "a"]
        assert uids(repository.list_orders(customer_id="one", track_number="x").orders) == ["e", "a"]
        assert uids(repository.list_orders(customer_id="%", track_number="_").orders) == ["f"]
        for unknown in ("", "on", "one ", "a\0b", "\ud800", "x" * 10_000):
            assert repository.list_orders(customer_id=unknown).orders == ()
            assert repository.list_orders(track_number=unknown, limit=1).orders == ()

    def test_filters_hold_on_every_page_both_ways(self, repository: OrderRepository) -> None:
        for index in range(9):
            repository.save(an_order(f"{index}", customer_id="even" if index % 2 == 0 else "odd"))
        first = repository.list_orders(limit=2, customer_id="even")
        assert uids(first.orders) == ["8", "6"]
        rest = repository.list_orders(limit=9, cursor=first.next_cursor, customer_id="even")
        assert uids(rest.orders) == ["4", "2", "0"]
        back = repository.list_orders(
            cursor=rest.orders[0].cursor, direction=Direction.NEWER, limit=9, customer_id="even"
        )
        assert uids(back.orders) == ["8", "6"]
        assert (
            repository.list_orders(
                cursor=rest.orders[0].cursor, direction=Direction.NEWER, customer_id="even", track_number="other"
            ).orders
            == ()
        )

    def test_since_includes_its_time_and_until_excludes_it(self, repository: OrderRepository) -> None:
        for uid in "abcd":
            repository.save(an_order(uid, customer_id="odd" if uid in "ac" else "even"))
        # An update does not move an order.
        repository.save(an_order("a", 1, customer_id="odd"))
        since, until = (stored(repository, uid).first_stored_at for uid in "bd")
        assert uids(repository.list_orders(since=since).orders) == ["d", "c", "b"]
        for offset in (
            dt.timedelta(hours=-9),
            dt.timedelta(hours=20, minutes=12),
            dt.timedelta(hours=-23, minutes=-59),
        ):
            elsewhere = since.astimezone(dt.timezone(offset))
            assert uids(repository.list_orders(since=elsewhere).orders) == ["d", "c", "b"]
            cursor = Cursor(first_stored_at=elsewhere, order_uid="b")
            assert uids(repository.list_orders(cursor=cursor).orders) == ["a"]
        assert uids(repository.list_orders(until=until).orders) == ["c", "b", "a"]
        assert uids(repository.list_orders(since=since, until=until, customer_id="even").orders) == ["b"]
        assert uids(repository.list_orders(since=since, until=until, track_number="t").orders) == ["c", "b"]
        assert repository.list_orders(since=until, until=until).orders == ()
        first = repository.list_orders(since=since, limit=2)
        assert uids(first.orders) == ["d", "c"]
        assert uids(repository.list_orders(since=since, cursor=first.next_cursor).orders) == ["b"]
        newer = repository.list_orders(since=since, until=until, limit=1, direction=Direction.NEWER)
        assert uids(newer.orders) == ["b"]
        assert uids(
            repository.list_orders(until=until, cursor=newer.next_cursor, direction=Direction.NEWER).orders
        ) == ["c"]

    @pytest.mark.parametrize("offset_h", [-14, 0, 14])
    def test_every_time_that_python_can_write_is_a_filter(self, repository: OrderRepository, offset_h: int) -> None:
        repository.save(an_order("a"))
        zone = dt.timezone(dt.timedelta(hours=offset_h))
        first, last = (time.replace(tzinfo=zone) for time in (dt.datetime.min, dt.datetime.max))  # noqa: DTZ901 - a zone follows
        assert uids(repository.list_orders(since=first, until=last).orders) == ["a"]
        assert repository.list_orders(since=last).orders == repository.list_orders(until=first).orders == ()

    @pytest.mark.parametrize("name", ["since", "until"])
    def test_a_time_without_an_offset_is_an_invalid_query(self, repository: OrderRepository, name: str) -> None:
        filters: Any = {name: dt.datetime(2026, 1, 1)}  # noqa: DTZ001 - the test is about such times
        with pytest.raises(InvalidQuery, match=f"{name}: expected a time with an offset"):
            repository.list_orders(**filters)
        with pytest.raises(InvalidQuery, match=f"{name}: expected a time with an offset"):
            list(repository.stream(**filters))

    def test_a_cursor_of_an_order_that_never_was_is_a_place_all_the_same(self, repository: OrderRepository) -> None:
        for uid in "abc":
            repository.save(an_order(uid))
        middle = stored(repository, "b").first_stored_at
        for strange in ("", "zzz", "\U0010ffff"):
            between = Cursor(first_stored_at=middle + dt.timedelta.resolution, order_uid=strange)
            assert uids(repository.list_orders(cursor=between).orders) == ["b", "a"]
            assert uids(repository.list_orders(cursor=between, direction=Direction.NEWER).orders) == ["c"]
        first, last = dt.datetime.min.replace(tzinfo=dt.UTC), dt.datetime.max.replace(tzinfo=dt.UTC)
        assert repository.list_orders(cursor=Cursor(first_stored_at=first, order_uid="a")).orders == ()
        assert len(repository.list_orders(cursor=Cursor(first_stored_at=last, order_uid="a")).orders) == 3

    @pytest.mark.parametrize("limit", [0, -1, 101])
    def test_a_limit_outside_1_to_100_is_an_invalid_query(self, repository: OrderRepository, limit: int) -> None:
        with pytest.raises(InvalidQuery, match="limit: expected 1 to 100"):
            repository.list_orders(limit=limit)
        with pytest.raises(InvalidQuery, match="limit: expected 1 to 100"):
            repository.list_orders(
                cursor=Cursor(first_stored_at=dt.datetime.now(dt.UTC), order_uid="a"),
                direction=Direction.NEWER,
                limit=limit,
            )

    @pytest.mark.parametrize(("limit", "kind"), [(5.0, "float"), (True, "bool"), ("5", "str"), (None, "NoneType")])
    def test_a_limit_is_an_integer(self, repository: OrderRepository, limit: Any, kind: str) -> None:
        with pytest.raises(TypeError, match=f"limit must be an int, not {kind}$"):
            repository.list_orders(limit=limit)

    @pytest.mark.parametrize("value", [5, None, b"older"])
    def test_a_direction_of_another_type_is_refused_without_its_value(
        self, repository: OrderRepository, value: Any
    ) -> None:
        with pytest.raises(TypeError, match=f"direction must be a Direction, not {type(value).__name__}$"):
            repository.list_orders(direction=value)

    def test_a_direction_is_also_taken_by_its_text(self, repository: OrderRepository) -> None:
        repository.save_many([an_order("a"), an_order("b")])
        older, newer = ("older", "newer")
        assert uids(repository.list_orders(direction=older, limit=1).orders) == ["b"]  # type: ignore[arg-type]
        assert uids(repository.list_orders(direction=newer, limit=1).orders) == ["a"]  # type: ignore[arg-type]
        with pytest.raises(InvalidQuery, match="direction: expected older or newer, found another text"):
            repository.list_orders(direction="SECRET")  # type: ignore[arg-type]

    def test_a_limit_is_checked_even_if_no_order_can_match(self, repository: OrderRepository) -> None:
        with pytest.raises(InvalidQuery, match="limit: expected 1 to 100"):
            repository.list_orders(limit=0, customer_id="a\0b")

    @pytest.mark.parametrize("filters", [{"customer": "c"}, {"customer_id": "c", "order_uid": "a"}])
    def test_an_unknown_filter_is_refused(self, repository: OrderRepository, filters: dict[str, Any]) -> None:
        for call in (repository.list_orders, repository.count, repository.stream):
            with pytest.raises(TypeError, match="unexpected keyword"):
                call(**filters)

    @pytest.mark.parametrize("name", ["limit", "cursor", "direction"])
    def test_what_chooses_a_page_is_no_filter(self, repository: OrderRepository, name: str) -> None:
        repository.save(an_order("a"))
        values: dict[str, Any] = {"limit": 1, "cursor": stored(repository, "a").cursor, "direction": Direction.NEWER}
        for call in (repository.count, repository.stream):
            for value in (values[name], None):
                with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                    call(**{name: value})

    def test_phone_and_email_are_filters_in_any_format(self, repository: OrderRepository) -> None:
        for uid, phone, email, customer_id in (
            ("a", "+49 (30) 12-34", "Ada@Example.org", "one"),
            ("b", "tel 0049 30 1234", "", "one"),
            ("c", "4930-1234", "ada@example.ORG", "two"),
            ("d", "none", "\N{LATIN SMALL LETTER A WITH DIAERESIS}da@example.org", "two"),
        ):
            repository.save(reached_at(uid, phone, email, customer_id=customer_id))
        assert uids(repository.list_orders(phone="49/30/1234").orders) == ["c", "a"]
        assert uids(repository.list_orders(phone="49301234", customer_id="one").orders) == ["a"]
        assert uids(repository.list_orders(email="ADA@EXAMPLE.ORG").orders) == ["c", "a"]
        assert uids(repository.list_orders(email="").orders) == ["b"]
        assert repository.list_orders(email="\N{LATIN CAPITAL LETTER A WITH DIAERESIS}da@example.org").orders == ()
        assert repository.list_orders(phone="49301234", email="").orders == ()
        for unknown in ("4930123", "ada@example.or", "a\0b", "\ud800", "%"):
            assert repository.list_orders(email=unknown).orders == ()
        first = repository.list_orders(phone="49301234", limit=1)
        assert uids(first.orders) == ["c"]
        assert uids(repository.list_orders(phone="49301234", cursor=first.next_cursor, limit=1).orders) == ["a"]
        newer = repository.list_orders(phone="49301234", limit=1, direction=Direction.NEWER)
        assert uids(newer.orders) == ["a"]
        assert newer.next_cursor is not None

    @pytest.mark.parametrize("phone", ["", "none", "+ ()"])
    def test_a_phone_number_without_digits_is_an_invalid_query(self, repository: OrderRepository, phone: str) -> None:
        with pytest.raises(InvalidQuery, match="phone: expected digits, found none"):
            repository.list_orders(phone=phone)

    def test_orders_are_counted_by_the_filters_of_the_list(self, repository: OrderRepository) -> None:
        assert repository.count() == 0
        repository.save_many([an_order("a", customer_id="x"), an_order("b", customer_id="x"), an_order("c")])
        repository.save(reached_at("d", "+1 2", "d@d", customer_id="x"))
        assert repository.count() == 4
        assert repository.count(customer_id="x", track_number="t") == 3
        assert repository.count(phone="12", email="D@D", customer_id="x") == 1
        assert repository.count(since=stored(repository, "d").first_stored_at) == 1
        assert repository.count(customer_id="a\0b") == repository.count(customer_id="y") == 0

    # Search

    def test_an_order_is_found_by_everything_that_identifies_it(self, repository: OrderRepository) -> None:
        repository.save(
            attrs.evolve(
                reached_at("b563FEB7-test", "+49 (30) 12-34", "Ada@Example.org", customer_id="C 1"),
                track_number="T/1",
                items=[attrs.evolve(SAMPLE_ORDER.items[0], rid=rid) for rid in ("r-1", "r-2", "r-2")],
            )
        )
        repository.save(an_order("other", customer_id="C 2", track_number="T/2"))
        found = stored(repository, "b563FEB7-test").summary
        for text, field in (
            ("b563FEB7-test", SearchField.ORDER_UID),
            ("  B563feb7-TEST\n", SearchField.ORDER_UID),
            ("https://orders.example:8443/a/orders/b563FEB7-test?format=json#top", SearchField.ORDER_UID),
            ("/orders/b563FEB7%2Dtest", SearchField.ORDER_UID),
            ("b563f", SearchField.ORDER_UID_PREFIX),
            ("B", SearchField.ORDER_UID_PREFIX),
            ("T/1", SearchField.TRACK_NUMBER),
            ("C 1", SearchField.CUSTOMER_ID),
            # Characters that a text is copied with, such as those that isolate it from text of another direction.
            ("\u2068C 1\u2069", SearchField.CUSTOMER_ID),
            ("\ufeff \u200e\u202aada@example.org\u202c\u200b\n\u2060", SearchField.EMAIL),
            ("49301234", SearchField.PHONE),
            ("tel: +49-30.1234", SearchField.PHONE),
            ("ada@EXAMPLE.org", SearchField.EMAIL),
            ("r-2", SearchField.RID),
        ):
            assert repository.find(text) == (Match(order=found, fields=(field,)),), text
        for text in (
            *STRANGE_UIDS,
            " ",
            "563FEB7",
            "T/",
            "c 1",
            "4930123",
            "301234",
            "ada@example",
            "R-1",
            "%",
            "b_63",
        ):
            assert repository.find(text) == (), text

    def test_several_matches_are_the_newest_with_every_reason(self, repository: OrderRepository) -> None:
        repository.save(an_order("a", customer_id="x"))
        repository.save(an_order("b", customer_id="x", track_number="x"))
        repository.save(reached_at("c", "1", "X"))
        repository.save(an_order("X"))
        repository.save(an_order("xy"))
        found = [(match.order.order_uid, list(match.fields)) for match in repository.find("x")]
        assert found == [
            ("X", ["order_uid"]),
            ("c", ["email"]),
            ("b", ["track_number", "customer_id"]),
            ("a", ["customer_id"]),
        ]
        assert [match.order.order_uid for match in repository.find("x", limit=3)] == ["X", "c", "b"]
        # A replaced order matches by its current version.
        repository.save(an_order("a", 2, customer_id="y"))
        assert [match.order.order_uid for match in repository.find("x")] == ["X", "c", "b"]

    def test_a_beginning_counts_only_if_no_complete_value_matches(self, repository: OrderRepository) -> None:
        for uid in ("AB", "abc", "aBd", "ab-", "b", "XY", "xy", "Xy"):
            repository.save(an_order(uid, customer_id="abc-shop"))
        assert [match.order.order_uid for match in repository.find("ab")] == ["AB"]
        assert [match.order.order_uid for match in repository.find("A", limit=3)] == ["AB", "ab-", "abc"]
        assert [match.order.order_uid for match in repository.find("abc")] == ["abc"]
        assert [match.order.order_uid for match in repository.find("X")] == ["XY", "Xy", "xy"]
        repository.save(an_order("b-X"))
        repository.save(an_order("B-x"))
        repository.save(an_order("b-x"))
        assert [match.order.order_uid for match in repository.find("b-x", limit=1)] == ["b-x"]
        assert len(repository.find("abc-shop")) == 8
        repository.save(an_order("aby"))
        repository.save(an_order("abX"))
        assert [match.order.order_uid for match in repository.find("AB", limit=1)] == ["AB"]
        repository.save(an_order("zza"))
        repository.save(an_order("zzX"))
        assert [match.order.order_uid for match in repository.find("zz", limit=1)] == ["zza"]
        assert [match.order.order_uid for match in repository.find("zz")] == ["zza", "zzX"]

    def test_of_order_uids_that_differ_only_in_case_a_search_shows_the_newest(
        self, repository: OrderRepository
    ) -> None:
        for uid in ("ZqA", "ZQa", "zqa", "ZQA", "zQa"):
            repository.save(an_order(uid))
        for limit in range(1, 6):
            exact = [match.order.order_uid for match in repository.find("zqa", limit=limit)]
            assert exact == ["zQa", "ZQA", "zqa", "ZQa", "ZqA"][:limit]
            beginning = [match.order.order_uid for match in repository.find("zq", limit=limit)]
            assert beginning == ["ZQA", "ZQa", "ZqA", "zQa", "zqa"][:limit]

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize(
        "text",
        [
            "x" * 1_000_000,
            "1" * 1_000_000,
            "/orders/x" * 100_000 + " y",
            "/orders/x" * 400 + " y",
            "x " * 500_000,
            "/orders/" + "%41" * 300_000,
        ],
        ids=lambda text: f"{text[:9]} {len(text)}",
    )
    def test_a_text_that_is_longer_than_any_field_matches_nothing_at_once(
        self, repository: OrderRepository, text: str
    ) -> None:
        repository.save(an_order("x"))
        assert repository.find(text) == ()

    @pytest.mark.parametrize("limit", [0, 101])
    def test_a_search_has_the_limits_of_the_list(self, repository: OrderRepository, limit: int) -> None:
        with pytest.raises(InvalidQuery, match="limit: expected 1 to 100"):
            repository.find("a", limit=limit)

    # Arguments of other types

    @pytest.mark.parametrize("value", [None, 5, b"SECRET", ["SECRET"], 1.5, SAMPLE_ORDER])
    def test_an_argument_of_another_type_is_refused_without_its_value(
        self, repository: OrderRepository, value: Any
    ) -> None:
        repository.save(an_order("a"))
        kind = type(value).__name__
        calls: list[tuple[Callable[[], object], str]] = [
            (lambda: repository.get(value), f"order_uid must be a str, not {kind}"),
            (lambda: repository.content_sha256(value), f"order_uid must be a str, not {kind}"),
            (lambda: repository.find(value), f"text must be a str, not {kind}"),
            (lambda: repository.get_many([value]), f"order_uid must be a str, not {kind}"),
            (lambda: repository.get_many(iter(["a", value])), f"order_uid must be a str, not {kind}"),
        ]
        if value is not None:
            calls += [
                (lambda: repository.list_orders(customer_id=value), f"customer_id must be a str, not {kind}"),
                (lambda: repository.list_orders(track_number=value), f"track_number must be a str, not {kind}"),
                (lambda: repository.list_orders(phone=value), f"phone must be a str, not {kind}"),
                (lambda: repository.list_orders(email=value), f"email must be a str, not {kind}"),
                (lambda: repository.list_orders(cursor=value), f"cursor must be a Cursor, not {kind}"),
                (lambda: repository.list_orders(since=value), f"since must be a datetime, not {kind}"),
                (lambda: repository.list_orders(until=value), f"until must be a datetime, not {kind}"),
            ]
        for call, reason in calls:
            with pytest.raises(TypeError, match=f"{reason}$") as raised:
                call()
            assert "SECRET" not in str(raised.value)
        if not isinstance(value, list | bytes):
            with pytest.raises(TypeError, match=f"several order_uids, not one {kind}"):
                repository.get_many(value)
        if not isinstance(value, Order):
            with pytest.raises(TypeError, match="Order"):
                repository.save(value)
            with pytest.raises(TypeError, match="Order"):
                repository.save_many([an_order("b"), value])
        # Nothing was stored, and the next call works.
        assert repository.get("a") == an_order("a")
        assert repository.get_many(["b"]) == {}
        assert uids(repository.list_orders().orders) == ["a"]

    @pytest.mark.parametrize("value", ["", "x", 0])
    def test_a_false_value_is_not_a_missing_cursor(self, repository: OrderRepository, value: Any) -> None:
        with pytest.raises(TypeError, match="cursor must be a Cursor"):
            repository.list_orders(cursor=value)

    def test_a_subclass_of_str_is_a_str(self, repository: OrderRepository) -> None:
        class Name(enum.StrEnum):
            ONE = "a"

        repository.save(an_order("a", customer_id="a"))
        assert repository.get(Name.ONE) == repository.get_many([Name.ONE])["a"] == an_order("a", customer_id="a")
        assert uids(repository.list_orders(customer_id=Name.ONE).orders) == ["a"]

    # Status

    def test_stats_have_the_newest_order_and_how_many_were_stored_recently(self, repository: OrderRepository) -> None:
        empty = repository.stats()
        assert (empty.newest_first_stored_at, empty.stored_recently) == (None, 0)
        repository.save_many([an_order("a"), an_order("b")])
        repository.save(an_order("c"))
        repository.save(an_order("a", 2))
        stats = repository.stats()
        assert stats.newest_first_stored_at == stored(repository, "c").first_stored_at
        assert stats.stored_recently == 3
        assert empty.asked_at < stats.newest_first_stored_at <= stats.asked_at
        assert stats.rejects_by_code == dict.fromkeys(REJECT_CODES, 0)

    def test_a_repository_that_can_be_read_passes_its_check(self, repository: OrderRepository) -> None:
        assert repository.check() is None


class StreamContract:
    """What ``stream`` promises.

    Give it a ``repository`` that is empty, and what other programs use: a ``writer``, which is a repository on the same
    store, and ``delete``, which deletes an order.
    """

    def test_a_stream_of_no_orders_ends_at_once(self, repository: OrderRepository) -> None:
        assert list(repository.stream()) == []
        assert list(repository.stream(customer_id="a\0b")) == []

    def test_a_stream_has_every_order_as_the_list_has_it(self, repository: OrderRepository) -> None:
        repository.save_many(an_order(uid) for uid in "cab")
        for uid in "fde":
            repository.save(an_order(uid))
        repository.save(an_order("a", 2))
        streamed = tuple(repository.stream())
        assert uids(streamed) == uids(repository.list_orders().orders)
        assert streamed == repository.list_orders().orders

    def test_filters_of_a_stream_are_exact_and_both_hold(self, repository: OrderRepository) -> None:
        for uid, customer_id, track_number in (
            ("a", "one", "x"),
            ("b", "one", "y"),
            ("c", "two", "x"),
            ("d", "On", "x"),
        ):
            repository.save(an_order(uid, customer_id=customer_id, track_number=track_number))
        assert uids(tuple(repository.stream(customer_id="one"))) == ["b", "a"]
        assert uids(tuple(repository.stream(track_number="x"))) == ["d", "c", "a"]
        assert uids(tuple(repository.stream(customer_id="one", track_number="x"))) == ["a"]
        repository.save(reached_at("e", "+1 23", "E@e"))
        assert uids(tuple(repository.stream(phone="123", email="e@E"))) == ["e"]
        assert uids(tuple(repository.stream(customer_id=None, track_number=None))) == ["e", "d", "c", "b", "a"]

    def test_a_wrong_filter_is_refused_before_the_iteration(self, repository: OrderRepository) -> None:
        wrong: list[dict[str, Any]] = [{"customer": "c"}, {"limit": "c"}, {"customer_id": 5}]
        for filters in wrong:
            with pytest.raises(TypeError, match=r"customer|limit"):
                repository.stream(**filters)

    def test_a_stream_of_more_orders_than_are_read_at_once_has_each_order_once(
        self, repository: OrderRepository
    ) -> None:
        number = 2 * STREAM_SIZE + 1
        repository.save_many(
            an_order(f"{index:05}", items=1, customer_id="odd" if index % 2 else "even") for index in range(number)
        )
        expected = [f"{index:05}" for index in reversed(range(number))]
        assert uids(tuple(repository.stream())) == expected
        assert uids(tuple(repository.stream(customer_id="even"))) == expected[::2]

    def test_a_stream_has_every_item_of_very_large_orders(self, repository: OrderRepository) -> None:
        orders = [an_order(f"{index:02}", index, items=1_000) for index in range(12)]
        repository.save_many(orders)
        assert [stored.order for stored in repository.stream()] == orders[::-1]

    def test_a_stream_has_the_sequence_of_the_list_if_the_newest_orders_are_very_large(
        self, repository: OrderRepository
    ) -> None:
        small = [an_order(f"a-{index:06}") for index in range(480)]
        large = [an_order(f"b-{index}", items=1_000) for index in range(5)]
        repository.save_many(small)
        repository.save_many(large)
        assert [stored.order for stored in repository.stream()] == [*large[::-1], *small[::-1]]

    def test_a_stream_shows_nothing_that_changes_after_its_first_order(
        self, repository: OrderRepository, writer: OrderRepository, delete: Callable[[str], None]
    ) -> None:
        writer.save_many(an_order(f"{index:05}", items=1) for index in range(STREAM_SIZE + 10))
        before = writer.list_orders(limit=1).orders[0]
        stream = repository.stream()
        assert next(stream) == before
        writer.save(an_order("new"))
        writer.save(an_order("00003", 2, items=3))
        delete("00001")
        rest = list(stream)
        assert uids(tuple(rest)) == [f"{index:05}" for index in reversed(range(STREAM_SIZE + 9))]
        assert {version for stored in rest for version in versions_in(stored.order)} == {0}
        assert {len(stored.order.items) for stored in rest} == {1}

    def test_a_stream_shows_what_was_saved_before_its_first_order(
        self, repository: OrderRepository, writer: OrderRepository
    ) -> None:
        stream = repository.stream()
        writer.save(an_order("new"))
        assert uids(tuple(stream)) == ["new"]

    def test_closing_a_stream_early_releases_its_connection(self, repository: OrderRepository) -> None:
        repository.save_many(an_order(f"{index}", items=1) for index in range(STREAM_SIZE + 1))
        for _ in range(20):
            stream = repository.stream()
            next(stream)
            stream.close()
            assert list(stream) == []
        assert repository.get("0") == an_order("0", items=1)


class Records(Protocol):
    """What a consumer does with the records of the topic ``orders``."""

    def begin(self, next_offset: int, *, partition: int = 0) -> None:
        """Begin to read a partition at this offset."""
        ...

    def handle(self, *, partition: int = 0, error: RejectedError | None = None) -> None:
        """Handle the next record of a partition: as a duplicate, or as a reject."""
        ...


REJECTION = InvalidOrder(
    [
        Fault(path="$.items[0].price", expected="an integer", found="a string"),
        Fault(path="$.locale", expected="a string", found="no value"),
    ],
    total=7,
)
REJECTED = PositionState(state=RecordState.REJECTED, code="invalid_order", faults=REJECTION.faults, total_faults=7)
WAITING = PositionState(state=RecordState.WAITING)
HANDLED = PositionState(state=RecordState.HANDLED)
UNKNOWN = PositionState(state=RecordState.UNKNOWN)


class PositionContract:
    """What ``position_state`` and ``wait_until_handled`` promise.

    Give it a ``repository``, and ``records`` that are handled in its store.
    """

    def test_a_record_of_a_partition_that_no_consumer_has_read_is_unknown(
        self, repository: OrderRepository, records: Records
    ) -> None:
        assert repository.position_state("orders", 0, 0) == UNKNOWN
        records.begin(0, partition=1)
        assert repository.position_state("orders", 0, 0) == UNKNOWN
        assert repository.position_state("others", 1, 0) == UNKNOWN
        assert repository.position_state("orders", 1, 0) == WAITING

    def test_a_record_waits_until_it_is_handled(self, repository: OrderRepository, records: Records) -> None:
        records.begin(5)
        assert repository.position_state("orders", 0, 5) == WAITING
        records.handle()
        assert repository.position_state("orders", 0, 5) == HANDLED
        assert repository.position_state("orders", 0, 6) == WAITING

    def test_a_rejected_record_has_its_code_and_its_faults(self, repository: OrderRepository, records: Records) -> None:
        records.begin(0)
        records.begin(0, partition=1)
        records.handle(error=REJECTION)
        records.handle(partition=1)
        assert repository.position_state("orders", 0, 0) == REJECTED
        assert repository.position_state("orders", 1, 0) == HANDLED

    @pytest.mark.parametrize(
        ("topic", "partition", "offset"),
        [
            ("orders", 0, -1),
            ("orders", -1, 0),
            ("orders", 2**31, 0),
            ("orders", 0, 2**63),
            ("orders", 2**100, 2**100),
            ("", 0, 0),
            ("a\0b", 0, 0),
            ("\ud800", 0, 0),
        ],
    )
    def test_a_position_that_cannot_exist_is_unknown(
        self, repository: OrderRepository, records: Records, topic: str, partition: int, offset: int
    ) -> None:
        records.begin(3)
        assert repository.position_state(topic, partition, offset) == UNKNOWN

    def test_a_position_of_other_types_is_refused(self, repository: OrderRepository) -> None:
        wrong: list[tuple[Any, Any, Any, str]] = [
            (b"orders", 0, 0, "topic must be a str, not bytes"),
            ("orders", "0", 0, "partition must be an int, not str"),
            ("orders", 0, True, "offset must be an int, not bool"),
            ("orders", 0, 1.0, "offset must be an int, not float"),
        ]
        for topic, partition, offset, reason in wrong:
            with pytest.raises(TypeError, match=reason):
                repository.position_state(topic, partition, offset)
            with pytest.raises(TypeError, match=reason):
                repository.wait_until_handled(topic, partition, offset, timeout_s=0)

    @pytest.mark.parametrize("value", [None, "5", True])
    def test_a_timeout_of_another_type_is_refused(self, repository: OrderRepository, value: Any) -> None:
        with pytest.raises(TypeError, match=f"timeout_s must be a number of seconds, not {type(value).__name__}$"):
            repository.wait_until_handled("orders", 0, 0, timeout_s=value)

    @pytest.mark.parametrize(("error", "expected"), [(None, HANDLED), (REJECTION, REJECTED)])
    def test_waiting_ends_when_the_record_is_handled(
        self, repository: OrderRepository, records: Records, error: RejectedError | None, expected: PositionState
    ) -> None:
        records.begin(0)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(repository.wait_until_handled, "orders", 0, 0, timeout_s=30)
            time.sleep(0.1)
            assert not waiting.done()
            records.handle(error=error)
            assert waiting.result(5) == expected
        # Now there is nothing to wait for.
        for timeout_s in (0, 10**400, -(10**400), float("inf"), float("-inf"), float("nan")):
            assert repository.wait_until_handled("orders", 0, 0, timeout_s=timeout_s) == expected

    def test_waiting_ends_with_the_last_state_at_its_time_limit(
        self, repository: OrderRepository, records: Records
    ) -> None:
        began_s = time.monotonic()
        assert repository.wait_until_handled("orders", 0, 0, timeout_s=0.2) == UNKNOWN
        records.begin(0)
        assert repository.wait_until_handled("orders", 0, 0, timeout_s=0.2) == WAITING
        assert repository.wait_until_handled("orders", 0, 0, timeout_s=-(10**400)) == WAITING
        assert 0.4 <= time.monotonic() - began_s < 5
