"""The plans of searches: each finds its orders along an index, with and without statistics."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from random import Random
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

import orderlib
from orderlib.postgres import queries
from orderlib.repository import Direction
from orderlib.search import SearchField
from services.sender.generate import generate_order
from tests.support.databases import Database

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
#: How many orders the tables have: many enough that a sequential scan costs more than an index.
ORDERS = 4_000

STATEMENTS: dict[str, tuple[LiteralString, list[object]]] = {
    **{str(field): (statement, ["x", 20]) for field, statement in queries.FIND.items()},
    **{f"order_uid {n}": (statement, ["ab", "ab~", 20]) for n, statement in enumerate(queries.FIND_ORDER_UIDS)},
    **{
        f"{name} {direction}{' after a cursor' if cursor else ''}": (
            queries.list_orders(direction, [name], cursor=cursor),
            [20, *(["2026-01-01T00:00:00Z", "x"] if cursor else []), "x"],
        )
        for name in ("phone", "email")
        for direction in Direction
        for cursor in (False, True)
    },
    "phone count": (queries.count_orders(["phone"]), [100, "x"]),
    "summaries": (queries.GET_SUMMARIES, [["a", "b", "c"]]),
}
INDEXES = {
    "phone": "delivery_by_phone",
    "email": "delivery_by_email",
    SearchField.ORDER_UID: "orders_by_lower_uid",
    SearchField.RID: "items_by_rid",
    SearchField.TRACK_NUMBER: "orders_newest_of_track",
    SearchField.CUSTOMER_ID: "orders_newest_of_customer",
    "order_uid 0": "orders_pkey",
    "order_uid 1": "orders_by_lower_uid",
}


@pytest.fixture(scope="module", params=["analyzed", "never analyzed"])
def superuser(module_database: Database, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection]:
    """A session over filled tables. What the planner knows of them is its own, and no setting is changed."""
    with psycopg.connect(module_database.superuser_url, autocommit=True) as connection:
        for table in ("orders", "delivery", "payment", "items"):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        rng = Random(7)
        with orderlib.connect(module_database.writer_url) as repository:
            repository.save_many(generate_order(rng, lambda: NOW) for _ in range(ORDERS))
        if request.param == "analyzed":
            connection.execute("ANALYZE orders, delivery, payment, items")
        yield connection


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_search_scans_no_table(superuser: psycopg.Connection, name: str, mode: str) -> None:
    statement, parameters = STATEMENTS[name]
    superuser.execute(sql.SQL("SET plan_cache_mode = {}").format(sql.Identifier(mode)))
    superuser.execute(sql.SQL("PREPARE search AS ") + sql.SQL(statement))
    try:
        execute = sql.SQL("EXPLAIN EXECUTE search ({})").format(sql.SQL(", ").join(map(sql.Literal, parameters)))
        plan = "\n".join(line for (line,) in superuser.execute(execute))
    finally:
        superuser.execute("DEALLOCATE search")
    assert "Seq Scan" not in plan, plan
    assert INDEXES.get(name, INDEXES.get(name.partition(" ")[0], "_pkey")) in plan, plan
