"""A refused connection: known configuration errors stop a program, everything else is an outage, in any language."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import re
import socket
import string
import time
import traceback
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors

from orderlib import (
    ConfigurationError,
    DatabaseUnavailable,
    OrderlibError,
    connect,
    connect_async,
)
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.roles import password_of
from orderlib.postgres.snapshot import snapshot
from tests.support.fake_postgres import error_response, refusing

#: "FATAL" as PostgreSQL writes it in its languages, and words that say nothing.
LANGUAGES = {
    "German": ("SCHWERWIEGEND", "das Datenbanksystem fährt hoch"),
    "Russian": ("ВАЖНО", "система баз данных запускается"),
    "Japanese": ("致命的エラー", "データベースシステムは起動しています"),
    "English": ("FATAL", "password authentication failed; starting up; too many; does not exist"),
}

SQLSTATES = sorted(
    {
        kind.sqlstate
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, psycopg.Error) and isinstance(kind.sqlstate, str)
    }
)

CONFIGURATION_ERRORS = {
    "28P01": "password",
    "28000": "pg_hba.conf",
    "3D000": "does not exist",
    "42501": "may not connect",
    "42704": "option",
    "22023": "option",
    "0A000": "feature not supported",
}
OUTAGES = [
    *(
        "57P01",
        "57P02",
        "57P03",
        "57P05",
        "57014",
        "53000",
        "53100",
        "53200",
        "53300",
        "53400",
        "55000",
        "55006",
        "08000",
    ),
    *(
        "08006",
        "25006",
        "25P03",
        "25P04",
        "40001",
        "54000",
        "58030",
        "58P01",
        "F0001",
        "XX000",
        "XX001",
        "ZZ999",
    ),
]


def refusal(port: int, host: str = "127.0.0.1") -> OrderlibError:
    with pytest.raises(OrderlibError) as raised:
        open_connection(f"postgresql://u:p@{host}:{port}/d", application_name="tests")
    return raised.value


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_refusal_that_may_pass_is_an_outage(language: str) -> None:
    severity, words = LANGUAGES[language]
    for sqlstate in OUTAGES:
        with refusing(error_response(sqlstate, words, severity)) as port:
            error = refusal(port)
        assert isinstance(error, DatabaseUnavailable), sqlstate
        assert sqlstate in str(error)
        assert f"127.0.0.1:{port}" in str(error)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_configuration_error_is_named(language: str) -> None:
    severity, words = LANGUAGES[language]
    for sqlstate, cause in CONFIGURATION_ERRORS.items():
        with refusing(error_response(sqlstate, words, severity)) as port:
            error = refusal(port)
        assert isinstance(error, ConfigurationError), sqlstate
        assert sqlstate in str(error)
        assert cause in str(error)
        assert f"127.0.0.1:{port}" in str(error)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("no more connections allowed (max_client_conn)", DatabaseUnavailable),
        ("server login has been failing, try again later (server_login_retry)", DatabaseUnavailable),
        ("server login failed: FATAL password authentication failed", DatabaseUnavailable),
        ("query_wait_timeout", DatabaseUnavailable),
        ("client_login_timeout (server down)", DatabaseUnavailable),
        ('database "orders" is disabled', DatabaseUnavailable),
        ("server conn crashed?", DatabaseUnavailable),
        ("the pooler is shut down", DatabaseUnavailable),
        ("no such user", ConfigurationError),
        ("no such database: orders", ConfigurationError),
        ("password authentication failed", ConfigurationError),
        ("SASL authentication failed", ConfigurationError),
        ("unsupported startup parameter: options", ConfigurationError),
    ],
)
def test_the_refusals_of_pgbouncer(words: str, kind: type[OrderlibError]) -> None:
    for severity in ("FATAL", "ERROR"):
        with refusing(error_response("08P01", words, severity)) as port:
            assert isinstance(refusal(port), kind)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", DatabaseUnavailable),
        (b"Ecould not fork new process for connection: No memory\n\0", DatabaseUnavailable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", DatabaseUnavailable),
        (b"R\0\0\0\x08\0\0\0\x03", ConfigurationError),  # a password in clear text is asked for, and answered
        (b"R\0\0\0\x08\0\0\0\x63", ConfigurationError),
    ],
)
def test_answers_without_an_sqlstate(answer: bytes, kind: type[OrderlibError]) -> None:
    with refusing(answer) as port, pytest.raises(kind):
        open_connection(f"postgresql://u@127.0.0.1:{port}/d", application_name="tests")


def test_a_host_name_that_cannot_be_resolved_is_an_outage_with_its_name() -> None:
    error = refusal(5432, host="no-such-host.invalid")
    assert isinstance(error, DatabaseUnavailable)
    assert "no-such-host.invalid" in str(error)


def test_a_server_that_accepts_a_connection_and_never_answers_is_named_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        url = f"postgresql://user@{address}/orders?connect_timeout=2"
        with pytest.raises(DatabaseUnavailable, match=f"^PostgreSQL at {address}: timeout expired$"):
            open_connection(url, application_name="tests")
        with pytest.raises(DatabaseUnavailable, match=rf"^PostgreSQL at {address}: no connection within 0\.1 s$"):
            connect(url, timeout_s=0.1)


def test_every_host_of_an_outage_is_named_with_its_cause() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        refusing(error_response("57P03", "starting up")) as starting,
        refusing(error_response("28P01", "password authentication failed")) as wrong,
    ):
        port = silent.getsockname()[1]
        hosts = f"127.0.0.1:{port},127.0.0.1:{starting},127.0.0.1:{wrong},127.0.0.1:1"
        with pytest.raises(DatabaseUnavailable) as raised:
            open_connection(f"postgresql://user@{hosts}/orders?connect_timeout=2", application_name="tests")
    assert raised.match(
        rf"^PostgreSQL at 127\.0\.0\.1:{port}: timeout expired; PostgreSQL at 127\.0\.0\.1:{starting}: .*57P03.*; "
        rf"PostgreSQL at 127\.0\.0\.1:{wrong}: .*28P01.*; PostgreSQL at 127\.0\.0\.1:1: Connection refused$"
    )


def test_every_sqlstate_gives_one_of_two_errors_with_its_code() -> None:
    for sqlstate in SQLSTATES:
        with refusing(error_response(sqlstate, "Wörter")) as port:
            error = refusal(port)
        kind = ConfigurationError if sqlstate[:2] in {"0A", "22", "28", "3D", "42"} else DatabaseUnavailable
        assert isinstance(error, kind), sqlstate
        assert sqlstate in str(error)


def test_the_repositories_tell_outage_and_configuration_apart() -> None:
    async def read(url: str) -> None:
        async with connect_async(url) as reader:
            await reader.get("x")

    for sqlstate, kind in {
        "53300": DatabaseUnavailable,
        "55000": DatabaseUnavailable,
        "28P01": ConfigurationError,
    }.items():
        with refusing(error_response(sqlstate, "Wörter", "SCHWERWIEGEND")) as port:
            url = f"postgresql://u:p@127.0.0.1:{port}/d"
            with pytest.raises(kind):
                connect(url)
            with pytest.raises(kind):
                asyncio.run(read(url))


SPECIAL = "@:/?#%&= []{}'\"\\,;+!$äЖ語😀"


def passwords(rng: random.Random, number: int) -> list[str]:
    """Return passwords with special characters between pieces that occur nowhere else."""
    letters = string.ascii_uppercase + string.digits
    found = []
    for _ in range(number):
        pieces = ["".join(rng.choices(letters, k=rng.randint(4, 8))) for _ in range(rng.randint(2, 4))]
        joints = ["".join(rng.choices(SPECIAL, k=rng.choice([1, 1, 1, 2]))) for _ in pieces[1:]] + [""]
        found.append("".join(piece + joint for piece, joint in zip(pieces, joints, strict=True)))
    return [f"1234/{'Z' * 8}", f"5432?{'QX' * 4}=1", *found]


def assert_no_piece_is_shown(password: str, shown: str) -> None:
    for start in range(len(password) - 3):
        piece = password[start : start + 4]
        assert piece not in shown or not set(piece) & set(string.ascii_uppercase), (password, shown)


def forms(password: str, address: str) -> list[str]:
    """Return URLs with this password, encoded rightly, not at all, and in the form key=value."""
    host, _, port = address.rpartition(":")
    quoted = password.replace("\\", "\\\\").replace("'", "\\'")
    return [
        f"postgresql://user:{password}@{address}/orders",
        f"postgres://user:{password}@{address}/orders?sslmode=prefer",
        f"postgresql://user:{password}@/orders?host={host}&port={port}",
        f"postgresql://{address}/orders?user=user&password={password}",
        f"postgresql://user:{urllib.parse.quote(password, safe='')}@{address}/orders",
        f"host={host} port={port} user=user password={password} dbname=orders",
        f"host={host} port={port} user=user dbname=orders password={password}",
        f"password={password} host={host} port={port} user=user dbname=orders",
        f"host={host} port={port} user=user password='{quoted}' dbname=orders",
    ]


def everything_shown(error: BaseException) -> str:
    """Return all that a log, a traceback or an error tracker can show of an error, its causes and its contexts."""
    shown = traceback.format_exception(error)
    errors, seen = [error], set[int]()
    while errors:
        error = errors.pop()
        if id(error) not in seen:
            seen.add(id(error))
            shown.append(f"{error} {error!r} {error.args} {vars(error)}")
            errors += [found for found in (error.__cause__, error.__context__) if found is not None]
    return "\n".join(shown)


@pytest.mark.parametrize("sqlstate", ["28P01", "3D000", "53300", None])
def test_no_piece_of_a_password_is_shown_whatever_the_url(
    sqlstate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Misread URLs name hosts that do not exist; no resolver is asked for them.
    def unresolved(host: object, *_: object, **__: object) -> None:
        raise OSError(-2, "Name or service not known", host)

    monkeypatch.setattr("socket.getaddrinfo", unresolved)
    for password in passwords(random.Random(random.getrandbits(32)), 12):
        answer = error_response(sqlstate, f'"{password}" „{password}“ {password}') if sqlstate else password.encode()
        with refusing(answer) as port:
            for url in forms(password, f"127.0.0.1:{port}"):
                url = (
                    f"{url}{'&' if '?' in url else '?'}connect_timeout=2"
                    if "://" in url
                    else f"{url} connect_timeout=2"
                )
                try:
                    open_connection(url, application_name="tests").close()
                except OrderlibError as exc:
                    assert_no_piece_is_shown(password, everything_shown(exc))
                try:
                    connect_async(url)
                except OrderlibError as exc:
                    assert_no_piece_is_shown(password, everything_shown(exc))


def broken_forms(password: str) -> list[str]:
    """Return URLs that put this password where libpq expects something else, or that libpq does not accept."""
    plain = re.sub("[@/?&]", ";", password)
    url = f"postgresql://user:{urllib.parse.quote(password, safe='')}@127.0.0.1:1/orders"
    return [
        f"postgresql://user:{plain}",
        f"postgresql://user:{plain}/orders",
        f"postgresql://user:secret@127.0.0.1:{plain}/orders",
        f"postgresql://user:secret@127.0.0.1/orders?port={plain}",
        f"{url}?connect_timeout={plain}",
        f"{url}?sslmode={plain}",
        f"{url}?{plain}",
        f"{url}?{plain}=1",
        url.replace("@", "%ff@"),
        url.replace("@", "%00@"),
        url.replace("@", "%zz@"),
        url.replace("@", "\udcff@"),
        url.replace("user:", "user:\0"),
        f"postgres:/user:{password}@127.0.0.1:1/orders",
        f"host=127.0.0.1 port=1 password='{plain}",
        f"host=127.0.0.1 port={plain} password=secret",
        f"{password} host=127.0.0.1 port=1",
        password,
    ]


async def read_once(url: str) -> None:
    async with connect_async(url) as reader:
        await reader.get("x")


def take_snapshot(url: str) -> None:
    with snapshot(url, application_name="tests"):
        pass


#: Every public call that takes a database URL.
PLACES: dict[str, Callable[[str], object]] = {
    "library": connect,
    "asyncio": lambda url: asyncio.run(read_once(url)),
    "one connection": lambda url: open_connection(url, application_name="tests"),
    "roles": lambda url: password_of("orders_writer", "ORDERS_DATABASE_URL", url),
    "consumer": lambda url: ConsumerStore(url, "group", time.monotonic).next_offsets({}, []),
    "proof": take_snapshot,
}


@pytest.mark.parametrize("place", PLACES)
def test_no_error_holds_a_piece_of_a_password_nor_do_its_causes_and_contexts(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unresolved(host: object, *_: object, **__: object) -> None:
        raise OSError(-2, "Name or service not known", host)

    monkeypatch.setattr("socket.getaddrinfo", unresolved)
    for password in passwords(random.Random(random.getrandbits(32)), 6):
        for url in (*broken_forms(password), *forms(password, "127.0.0.1:1")):
            try:
                PLACES[place](url)
            except OrderlibError as exc:
                try:
                    raise RuntimeError("the caller's own error") from exc
                except RuntimeError as wrapped:
                    logging.exception("as a program would log it")
                    assert_no_piece_is_shown(password, everything_shown(wrapped))
    assert "the caller's own error" in caplog.text


@pytest.mark.parametrize("url", [None, 5, b"postgresql://u:SECRET@127.0.0.1/orders"])
@pytest.mark.parametrize("place", PLACES)
def test_a_url_of_another_type_is_refused_without_its_value(place: str, url: Any) -> None:
    with pytest.raises(TypeError, match="the database URL must be a str, not") as raised:
        PLACES[place](url)
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:top@SECRETTAIL@127.0.0.1/orders",
        "postgresql://u:top@SECRET/TAIL@127.0.0.1/orders",
        "postgresql://u:1234/SECRETTAIL@127.0.0.1/orders",
        "postgresql://u:1234?user=SECRETTAIL@127.0.0.1/orders",
        "host=127.0.0.1 password=x host=SECRETTAIL",
    ],
)
def test_a_url_that_can_be_read_in_two_ways_is_refused_with_advice(url: str) -> None:
    with pytest.raises(ConfigurationError, match="%40") as raised:
        open_connection(url, application_name="tests")
    assert "SECRET" not in str(raised.value)
    assert "TAIL" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "[other]\nhost=127.0.0.1\n", "[orders]\nnonsense\n"])
def test_a_service_that_is_not_defined_is_a_configuration_error(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pg_service.conf"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with pytest.raises(ConfigurationError, match="PGSERVICE"):
        open_connection("service=orders", application_name="tests")


def test_a_password_that_is_not_utf_8_is_a_configuration_error_without_the_password() -> None:
    secret = "s3cret"
    with pytest.raises(ConfigurationError, match="the database URL") as caught:
        open_connection(f"postgresql://orders:{secret}\udcff@127.0.0.1:1/orders", application_name="tests")
    assert secret not in everything_shown(caught.value)
