"""The programs in examples/ run on the wheel alone, and do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest

import orderlib
from orderlib.testing import SAMPLE
from sandbox.server import free_port
from tests.support import ROOT
from tests.support.databases import Database
from tests.support.waiting import wait_for
from tests.support.wheel import Environment, build_wheel, make_environment, run

SAMPLE_ORDER = orderlib.decode_order(SAMPLE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel and its dependencies, a web framework with its server, and pytest."""
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    return make_environment(wheel, tmp_path_factory.mktemp("environment"), "falcon", "gunicorn", "pytest")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples: nothing of the checkout is on the path of a program."""
    return Path(shutil.copytree(ROOT / "examples", tmp_path / "examples"))


def environ(folder: Path, **settings: str) -> dict[str, str]:
    return {"PATH": os.defpath, "HOME": str(folder), "PYTHONUNBUFFERED": "1", **settings}


def order(order_uid: str, **changed: Any) -> orderlib.Order:
    return attrs.evolve(SAMPLE_ORDER, order_uid=order_uid, **changed)


def test_the_environment_has_the_library_and_not_the_checkout(environment: Environment) -> None:
    path = environment.run("import orderlib; print(orderlib.__file__)").strip()
    assert Path(path).is_relative_to(environment.site_packages)
    assert [name for name in ("services", "tests", "sandbox", "hypothesis") if environment.can_import(name)] == []


@pytest.fixture
def service(environment: Environment, folder: Path, database: Database) -> Iterator[str]:
    """The address of the web service, over a database with its table."""
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute((folder / "gift_messages.sql").read_bytes())
    port = free_port()
    process = subprocess.Popen(
        [
            *(environment.python, "-m", "gunicorn", "--worker-class", "asgi", "--bind", f"127.0.0.1:{port}"),
            "web_service:create_app()",
        ],
        cwd=folder,
        env=environ(folder, ORDERS_DATABASE_URL=database.writer_url),
    )
    try:
        url = f"http://127.0.0.1:{port}/gifts"
        wait_for(lambda: answers(f"{url}/nobody"))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return send(url)[0] == 404
    except urllib.error.URLError:
        return False


def send(url: str, body: bytes | None = None) -> tuple[int, Any]:
    """Return the status and the JSON of the answer."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def gift(order_json: bytes, message: str) -> bytes:
    return b'{"order": %b, "gift_message": %b}' % (order_json, json.dumps(message).encode())


def test_the_web_service_stores_an_order_and_its_own_row_or_neither(service: str, database: Database) -> None:
    def messages() -> list[tuple[Any, ...]]:
        with psycopg.connect(database.writer_url) as connection:
            return connection.execute("SELECT order_uid, message FROM gift_messages ORDER BY order_uid").fetchall()

    first = orderlib.encode_order(order("first"))
    assert send(service, gift(first, "Happy birthday")) == (201, {"outcome": "stored"})
    assert messages() == [("first", "Happy birthday")]
    assert send(f"{service}/first") == (200, {"order": json.loads(first), "gift_message": "Happy birthday"})

    # PostgreSQL refuses the message after it has taken the order.
    status, refused = send(service, gift(orderlib.encode_order(order("second")), "x" * 501))
    assert status == 422
    assert refused["description"].startswith("gift_message: expected")
    changed = orderlib.encode_order(order("first", entry="changed"))
    assert send(service, gift(changed, "a\0b"))[0] == 422

    status, refused = send(
        service, gift(first.replace(b'"locale":"en"', b'"locale":"SECRET"').replace(b"1817", b"-1"), "x")
    )
    assert status == 422
    assert "$.payment.amount" in refused["description"]
    assert "SECRET" not in json.dumps(refused)

    for body in (b"", b"{}", b"[" * 1000, b'{"order": {}, "gift_message": "\xff"}'):
        assert send(service, body)[0] == 422
    assert send(service, gift(first, "Happy birthday")) == (201, {"outcome": "duplicate"})
    assert messages() == [("first", "Happy birthday")]
    with orderlib.connect(database.reader_url) as repository:
        assert [stored.order for stored in repository.stream()] == [order("first")]


def test_the_nightly_export_copies_what_has_changed(
    environment: Environment, folder: Path, database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "orders.sqlite3"

    def export(url: str = database.reader_url) -> str:
        settings = environ(folder, ORDERS_READER_URL=url)
        return run(
            environment.python, "-W", "error", "nightly_export.py", path, environ=settings, folder=folder
        ).strip()

    def copied() -> dict[str, bytes]:
        with closing(sqlite3.connect(path)) as file:
            return dict(file.execute("SELECT order_uid, json FROM orders"))

    with orderlib.connect(database.writer_url) as repository:
        repository.save_many([order(uid) for uid in ("kept", "changed", "forgotten")])
        assert export() == "3 written, 0 unchanged, 0 removed"
        changed = order("changed", items=SAMPLE_ORDER.items[:1])
        repository.save_many([changed, order("new")])
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("DELETE FROM orders WHERE order_uid = 'forgotten'")
    with pytest.raises(AssertionError, match="ConfigurationError"):
        export(database.reader_url + "-missing")
    assert copied().keys() == {"kept", "changed", "forgotten"}
    assert export() == "2 written, 1 unchanged, 1 removed"
    expected = (order("kept"), changed, order("new"))
    assert copied() == {each.order_uid: orderlib.encode_order(each) for each in expected}
    with closing(sqlite3.connect(path)) as file:
        items = dict(file.execute("SELECT order_uid, count(*) FROM items GROUP BY order_uid"))
    assert items == {each.order_uid: len(each.items) for each in expected}


def test_the_pytest_suite_passes_on_the_wheel(environment: Environment, folder: Path) -> None:
    suite = folder / "pytest_suite"
    output = run(environment.python, "-W", "error", "-m", "pytest", "-q", environ=environ(folder), folder=suite)
    assert re.search(r"^\d+ passed in ", output, re.MULTILINE), output


@pytest.mark.faults  # tests/unit/test_typed_examples.py checks the same files with pyright, on the checkout
def test_the_pytest_suite_is_strictly_typed_on_the_wheel(environment: Environment, folder: Path) -> None:
    suite = folder / "pytest_suite"
    run(sys.executable, "-m", "mypy", "--strict", "--python-executable", environment.python, ".", folder=suite)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("except orderlib.TransientError:\n            #", "except orderlib.TransactionConflict:\n            #"),
        pytest.param(
            "except orderlib.RejectedError:\n            return",
            "except orderlib.InvalidOrder:\n            return",
            marks=pytest.mark.faults,
        ),
        pytest.param("for attempt in range(ATTEMPTS)", "for attempt in range(1)", marks=pytest.mark.faults),
        pytest.param('f"line {number}: {fault}"', '"fault"', marks=pytest.mark.faults),
        pytest.param("customer_id=customer_id", "customer_id=None", marks=pytest.mark.faults),
    ],
)
def test_the_pytest_suite_fails_if_the_shop_has_a_bug(
    environment: Environment, folder: Path, line: str, broken: str
) -> None:
    suite = folder / "pytest_suite"
    source = (suite / "shop.py").read_text(encoding="utf-8")
    assert line in source
    (suite / "shop.py").write_text(source.replace(line, broken), encoding="utf-8")
    with pytest.raises(AssertionError, match="failed"):
        run(environment.python, "-m", "pytest", "-q", environ=environ(folder), folder=suite)
