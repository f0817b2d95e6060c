"""One contract: what a model takes, what the decoder takes and what PostgreSQL takes are the same values.

Three things are kept by the only write path instead of the database: how many items there are, that their lines have
no gaps, and that there is one delivery and one payment. And a column has one type, so PostgreSQL is asked about values
of that type alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import attrs
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.inspect import DateTimeType, IntType, StrType, Type
from psycopg import sql

from orderlib import Delivery, Item, Order, Payment, PostgresOrderRepository, connect, decode_order, encode_order
from orderlib.contract import BIGINT_MAX, INTEGER_MAX, column_type, rule_of, rules_of
from orderlib.ingestion.records import PreparedOrder
from orderlib.postgres.rows import (
    DELIVERY_COLUMNS,
    ITEM_COLUMNS,
    ORDER_COLUMNS,
    PAYMENT_COLUMNS,
)
from orderlib.testing import SAMPLE
from orderlib.testing.strategies import orders, values
from tests.support.boundary_values import PLACES, Place, boundary_values, decoder_accepts, model_accepts
from tests.support.databases import Database

SAMPLE_ORDER = decode_order(SAMPLE)

TABLES: dict[str | None, tuple[str, type[attrs.AttrsInstance]]] = {
    None: ("orders", Order),
    "delivery": ("delivery", Delivery),
    "payment": ("payment", Payment),
    "items": ("items", Item),
}


def row_of(model: object, columns: Sequence[str]) -> dict[str, object]:
    """A model's columns with their values."""
    return {name: getattr(model, name) for name in columns}


#: The sample as the rows of its tables, by column; for ``orders`` with what the store adds.
BASE_ROWS: dict[str | None, dict[str, object]] = {
    None: {
        **row_of(SAMPLE_ORDER, ORDER_COLUMNS),
        "content_sha256": PreparedOrder.of(SAMPLE_ORDER).content_sha256,
        "first_stored_at": SAMPLE_ORDER.date_created,
        "stored_at": SAMPLE_ORDER.date_created,
    },
    "delivery": row_of(SAMPLE_ORDER.delivery, DELIVERY_COLUMNS),
    "payment": row_of(SAMPLE_ORDER.payment, PAYMENT_COLUMNS),
    "items": {"line": 0, **row_of(SAMPLE_ORDER.items[0], ITEM_COLUMNS)},
}


@pytest.fixture(scope="module")
def writer(module_database: Database) -> Iterator[psycopg.Connection]:
    """A session of the writer that bypasses orderlib's validation.

    The order `base` is stored, so that parts can refer to it.
    """
    with psycopg.connect(module_database.writer_url, autocommit=True) as connection:
        base = {**BASE_ROWS[None], "order_uid": "base"}
        connection.execute(insertion("orders", list(base)), list(base.values()))
        yield connection


@pytest.fixture(scope="module")
def repository(module_database: Database) -> Iterator[PostgresOrderRepository]:
    with connect(module_database.writer_url) as repository:
        # Connect now: connecting draws random numbers, and hypothesis forbids that while it draws examples.
        repository.stats()
        yield repository


def insertion(table: str, columns: Sequence[str]) -> sql.Composed:
    """The statement that inserts one row."""
    return sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
    )


def postgres_accepts(writer: psycopg.Connection, place: Place, value: object) -> bool:
    """Return whether PostgreSQL accepts the sample's row with this value. Roll back."""
    table, _ = TABLES[place.part]
    row = {**({} if place.part is None else {"order_uid": "base"}), **BASE_ROWS[place.part], place.name: value}
    try:
        with writer.transaction(force_rollback=True):
            writer.execute(insertion(table, list(row)), list(row.values()))
    except psycopg.errors.UniqueViolation:
        # Accepted: another test has stored the same row.
        return True
    except (psycopg.DataError, psycopg.IntegrityError, UnicodeEncodeError):
        # Data exceptions and violated constraints, or a text that the driver cannot even send. Anything else is a bug.
        return False
    return True


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_all_three_accept_the_same_values_around_every_bound(writer: psycopg.Connection, place: Place) -> None:
    # Not times without an offset: PostgreSQL would read them in the session's time zone.
    values = {value for value in boundary_values(place.rule) if getattr(value, "tzinfo", "not a time") is not None}
    by_postgres = {value: postgres_accepts(writer, place, value) for value in values}
    assert set(by_postgres.values()) == {True, False}
    assert by_postgres == {value: model_accepts(place, SAMPLE_ORDER, value) for value in values}
    assert by_postgres == {value: decoder_accepts(place, SAMPLE_ORDER, value) for value in values}


@given(st.data())
@settings(max_examples=30)
def test_all_three_accept_the_same_values_drawn_at_random(writer: psycopg.Connection, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(PLACES))
    match place.rule:
        case StrType():
            # Any text at all, and those that differ little from what the rule asks for.
            any_text = st.text(st.characters(), max_size=400).filter(lambda text: not _SURROGATE_PAIR.search(text))
            almost = st.text("AZaz09._:-\n \0é", max_size=4)
            strategy = values(place.rule) | any_text | almost
        case IntType():
            strategy = values(place.rule) | st.integers() | st.integers(-(2**66), 2**66)
        case DateTimeType():
            strategy = st.datetimes(timezones=st.timezones())
        case _:
            raise NotImplementedError
    for value in data.draw(st.lists(strategy, min_size=10, max_size=20), label=str(place)):
        accepted = postgres_accepts(writer, place, value)
        assert accepted == model_accepts(place, SAMPLE_ORDER, value), value
        if not isinstance(place.rule, DateTimeType):
            assert accepted == decoder_accepts(place, SAMPLE_ORDER, value), value


_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_no_column_of_the_contract_accepts_null(writer: psycopg.Connection, place: Place) -> None:
    assert not postgres_accepts(writer, place, None)


@given(st.lists(orders(), min_size=1, max_size=8, unique_by=lambda order: order.order_uid))
@settings(max_examples=25)
def test_what_is_stored_is_read_back_exactly_as_it_was_sent(
    repository: PostgresOrderRepository, sent: list[Order]
) -> None:
    repository.save_many(decode_order(encode_order(order)) for order in sent)
    assert repository.get_many(order.order_uid for order in sent) == {order.order_uid: order for order in sent}
    for order in sent[:2]:
        assert encode_order(repository.get(order.order_uid)) == encode_order(order)


# The schema


def check_clause(column: str, rule: Type) -> str:
    """Return the condition of the CHECK constraint that a migration must have for a rule."""
    match rule:
        case StrType(min_length=minimum, max_length=maximum, pattern=pattern):
            length = (
                f"char_length({column}) <= {maximum}"
                if not minimum
                else f"char_length({column}) BETWEEN {minimum} AND {maximum}"
            )
            return f"{length} AND {column} ~ '{pattern}'" if pattern else length
        case IntType(ge=minimum, le=maximum):
            bounded = maximum is not None and maximum not in {INTEGER_MAX, BIGINT_MAX}
            return f"{column} BETWEEN {minimum} AND {maximum}" if bounded else f"{column} >= {minimum}"
        case DateTimeType():
            return f"{column} >= '0001-01-01 00:00:00+00' AND {column} < '10000-01-01 00:00:00+00'"
        case _:
            raise NotImplementedError(f"no CHECK clause for a rule of kind {rule}")


def contract_columns(model: type[attrs.AttrsInstance]) -> dict[str, sql.Composable]:
    """The definition of each column that the contract asks for, by name. An optional field has a default."""
    return {
        field.name: sql.SQL("{} {} NOT NULL {} CHECK ({})").format(
            sql.Identifier(field.name),
            sql.SQL(column_type(rule_of(field))),
            sql.SQL("") if field.required else sql.SQL("DEFAULT {}").format(sql.Literal(field.default)),
            sql.SQL(check_clause(field.name, rule_of(field))),
        )
        for field in rules_of(model).fields
        if isinstance(rule_of(field), StrType | IntType | DateTimeType)
    }


_COLUMNS = """
    SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = %s::regclass AND a.attname = ANY(%s) ORDER BY a.attname
"""
_CHECKS = """
    SELECT a.attname, replace(pg_get_constraintdef(c.oid), ' NOT VALID', '') FROM pg_constraint c
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND c.conkey = ARRAY[a.attnum]
    WHERE c.conrelid = %s::regclass AND c.contype = 'c' AND a.attname = ANY(%s) ORDER BY 1, 2
"""


@pytest.mark.parametrize(("table", "model"), TABLES.values())
def test_the_columns_and_their_checks_are_those_of_the_contract(
    module_database: Database, table: str, model: type[attrs.AttrsInstance]
) -> None:
    columns = contract_columns(model)
    names = list(columns)
    with psycopg.connect(module_database.superuser_url) as superuser:
        definitions = sql.SQL(", ").join(columns.values())
        superuser.execute(sql.SQL("CREATE TEMPORARY TABLE contract ({})").format(definitions))
        for question in (_COLUMNS, _CHECKS):
            asked_of_the_contract = superuser.execute(question, ["pg_temp.contract", names]).fetchall()
            assert len(asked_of_the_contract) == len(names)
            assert superuser.execute(question, [f"public.{table}", names]).fetchall() == asked_of_the_contract


@pytest.mark.parametrize(
    ("table", "model", "added"),
    [
        (
            "orders",
            Order,
            {
                "content_sha256",
                "source_topic_id",
                "source_partition",
                "source_offset",
                "source_time",
                "first_stored_at",
                "stored_at",
                "version",
                "has_original",
            },
        ),
        ("delivery", Delivery, {"order_uid"}),
        ("payment", Payment, {"order_uid"}),
        ("items", Item, {"order_uid", "line"}),
    ],
)
def test_a_table_has_the_fields_of_its_model_and_what_the_store_adds(
    module_database: Database, table: str, model: type[attrs.AttrsInstance], added: set[str]
) -> None:
    with psycopg.connect(module_database.superuser_url) as superuser:
        found = superuser.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = 'public' AND table_name = %s",
            [table],
        )
        assert {name for (name,) in found} == contract_columns(model).keys() | added


def test_the_columns_of_the_store_have_checks_too(writer: psycopg.Connection) -> None:
    whole_source: dict[str, object] = {
        "source_topic_id": "t",
        "source_partition": 0,
        "source_offset": 0,
        "source_time": SAMPLE_ORDER.date_created,
    }
    base: dict[str, object] = {**BASE_ROWS[None], "order_uid": "other"}
    cases: list[tuple[dict[str, object], bool]] = [
        (whole_source, True),
        *(({**whole_source, name: None}, False) for name in whole_source),
        ({"content_sha256": b"short"}, False),
        ({"first_stored_at": None}, False),
    ]
    for added, fits in cases:
        row = {**base, **added}
        try:
            with writer.transaction(force_rollback=True):
                writer.execute(insertion("orders", list(row)), list(row.values()))
            taken = True
        except psycopg.IntegrityError:
            taken = False
        assert taken == fits, added
