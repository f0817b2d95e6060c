"""What the API replaces in gunicorn decides as gunicorn does."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.asgi.parser import PythonProtocol  # type: ignore[import-untyped]
from hypothesis import event, given, settings
from hypothesis import strategies as st

from services.api.server import _Parser, _Protocol

USUAL = st.sampled_from([b"Accept:\t*/* ", b"X-1:", b"X-2: 1\xe9", b"Connection: close", b"Content-Length: 5"])
NAMES = st.sampled_from(
    [b"Host", b"Content-Length", b"Transfer-Encoding", b"X_1", b"X!", b"x y", b"\xff", b"", b"A" * 50]
)
VALUES = st.sampled_from([b" ", b"5", b"-1", b"chunked", b"\xe9", b"\x00", b"\x7f", b"\r"]) | st.binary(max_size=60)
ODD = st.tuples(NAMES | st.binary(max_size=3), st.sampled_from([b":", b" :", b""]), VALUES).map(b"".join)
LINE = st.one_of(*[USUAL.map(lambda line: line + b"\r\n")] * 9, ODD.map(lambda line: line + b"\r\n"), ODD)
TAILS = st.sampled_from(
    [b"\r\n", b"\r\nhello", b"\r\n5\r\nhello\r\n0\r\n\r\n", b"\r\nGET / HTTP/1.1\r\n\r\n", b"", b"\r"]
)


def outcome(parser_class: Any, parts: list[bytes], **limits: int) -> object:
    """Return what a parser makes of a request that arrives in parts: its state, or its error."""
    parser = parser_class(**limits)
    body: list[bytes] = []
    parser._on_body = body.append
    try:
        for part in parts:
            parser.feed(part)
    except Exception as exc:  # noqa: BLE001 - the errors are compared
        return type(exc), str(exc)
    names = ("method", "path", "headers", "content_length", "is_chunked", "should_keep_alive", "is_complete", "_state")
    return {name: getattr(parser, name) for name in names}, body, bytes(parser._buffer)


@settings(max_examples=500)
@given(
    lines=st.lists(LINE, max_size=5),
    tail=TAILS,
    cuts=st.lists(st.integers(0, 100), max_size=2),
    fields=st.sampled_from([0, 2, 100]),
    size=st.sampled_from([0, 20, 8190]),
)
def test_a_head_is_read_as_by_gunicorn(
    lines: list[bytes], tail: bytes, cuts: list[int], fields: int, size: int
) -> None:
    sent = b"GET / HTTP/1.1\r\n" + b"".join(lines) + tail
    places = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    parts = [sent[begin:end] for begin, end in itertools.pairwise(places)]
    limits = {"limit_request_fields": fields, "limit_request_field_size": size}
    expected = outcome(PythonProtocol, parts, **limits)
    event("refused" if isinstance(expected, tuple) and isinstance(expected[0], type) else "read")
    assert outcome(_Parser, parts, **limits) == expected


@pytest.mark.parametrize(
    "parts",
    [[b"GET / HTTP/1.1\r\nA: 1\r\nB: 2\r\nC: 3\r\n\r\n"], [b"GET / HTTP/1.1\r\nA: 1\r\n", b"B: 2\r\nC: 3\r\n\r\n"]],
)
def test_headers_are_counted_as_by_gunicorn(parts: list[bytes]) -> None:
    for limit in (2, 3):
        expected = outcome(PythonProtocol, parts, limit_request_fields=limit)
        assert outcome(_Parser, parts, limit_request_fields=limit) == expected


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_of_a_header_is_judged_as_by_gunicorn(byte: int) -> None:
    for line in (b"X%c: 1", b"%cX: 1", b"X: a%cb", b"X: %c", b"X: a%c"):
        parts = [b"GET / HTTP/1.1\r\nHost: a\r\n" + line % byte + b"\r\n\r\n"]
        assert outcome(_Parser, parts) == outcome(PythonProtocol, parts)


def test_the_usual_headers_are_read_without_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PythonProtocol, "_parse_headers")
    found = outcome(_Parser, [b"GET / HTTP/1.1\r\nHost: a\r\nAccept:\t*/* \r\n\r\n"])
    assert isinstance(found, tuple)
    assert found[0]["headers"] == [(b"host", b"a"), (b"accept", b"*/*")]


def test_requests_of_one_connection_are_read_as_by_gunicorn() -> None:
    """The second arrives with the first, as when a client does not wait for answers."""
    read = []
    for parser_class in (_Parser, PythonProtocol):
        parser = parser_class()
        parser.feed(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
        first = (parser.path, parser.headers, parser.is_complete)
        rest = parser.remaining()
        parser.reset()
        parser.feed(rest)
        read.append((first, parser.path, parser.headers, parser.should_keep_alive, parser.remaining()))
    assert read[0] == read[1]
    assert read[0][1:] == (b"/2", [(b"host", b"b"), (b"connection", b"close")], False, b"")


def test_a_request_that_arrives_as_the_time_ends_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    connection = _Protocol.__new__(_Protocol)
    monkeypatch.setattr(connection, "_keepalive_timeout", lambda: closed.append(True), raising=False)
    connection.worker = SimpleNamespace(loop=SimpleNamespace(time=lambda: 10.0))
    connection._waits_until = 10.0
    connection._current_request = object()
    connection._check_request()
    assert not closed
    connection._current_request = None
    connection._check_request()
    assert closed
