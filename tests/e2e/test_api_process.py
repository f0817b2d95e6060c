"""The API as a program: start, stop, settings, and clients that try to block it."""

from __future__ import annotations

import errno
import http.client
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import attrs
import hypothesis
import psutil
import psycopg
import pytest
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

import orderlib
from orderlib.testing import SAMPLE as SAMPLE_JSON
from services.api.asgi import API_CONNECTIONS, HEALTH_CONNECTIONS
from services.api.server import CONSTANT_HEADERS
from tests.support import ROOT
from tests.support.api_process import HALF_A_REQUEST, Answer, Service, clients, serving, settings_for
from tests.support.databases import Database, bootstrap
from tests.support.programs import run
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
PATH = f"/orders/{SAMPLE.order_uid}"


@pytest.fixture(scope="module")
def stored(module_database: Database) -> Database:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
        repository.save_many(attrs.evolve(SAMPLE, order_uid=f"n-{n}", items=SAMPLE.items * 10) for n in range(100))
    return module_database


@pytest.fixture(scope="module")
def api(stored: Database) -> Iterator[Service]:
    with serving(settings_for(stored.reader_url)) as service:
        yield service


@pytest.fixture
def mortal(stored: Database) -> Iterator[Service]:
    """An API for one test, which may stop or kill it."""
    with serving(settings_for(stored.reader_url)) as service:
        yield service


def refused(environ: dict[str, str]) -> str:
    """Return the one line that the API logs when it refuses to start."""
    ended = run("api", environ)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    [line] = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    return line


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ORDERS_READER_URL": ""}, "ORDERS_READER_URL"),
        ({"ORDERS_READER_URL": "nonsense://secret"}, "database URL"),
        ({"ORDERS_API_AUTH": ""}, "ORDERS_API_TOKENS"),
        ({"ORDERS_API_AUTH": "maybe"}, "ORDERS_API_AUTH"),
        ({"ORDERS_API_TOKENS": "a:b"}, "contradict"),
        ({"ORDERS_API_AUTH": "", "ORDERS_API_TOKENS": "no-name-secret"}, "ORDERS_API_TOKENS"),
        ({"ORDERS_API_BIND": "nowhere"}, "ORDERS_API_BIND"),
        ({"ORDERS_METRICS_BIND": "127.0.0.1:99999"}, "ORDERS_METRICS_BIND"),
        ({"WEB_CONCURRENCY": "several"}, "WEB_CONCURRENCY"),
    ],
)
def test_wrong_settings_are_named_in_one_line(stored: Database, changed: dict[str, str], named: str) -> None:
    line = refused({**settings_for(stored.reader_url), **changed})
    assert named in line
    assert "secret" not in line


def test_an_empty_number_of_workers_counts_as_not_set(stored: Database) -> None:
    with serving(settings_for(stored.reader_url, WEB_CONCURRENCY="")) as api:
        assert api.get("/livez").status == 200


def test_a_database_without_schema_is_named_in_one_line(stored: Database, empty_database: Database) -> None:
    bootstrap(empty_database)
    assert "python -m orderlib migrate" in refused(settings_for(empty_database.reader_url))
    wrong_password = refused(settings_for(make_conninfo(stored.reader_url, password="wrong")))
    assert "password authentication failed" in wrong_password
    assert "does not exist" in refused(settings_for(make_conninfo(stored.reader_url, dbname="nowhere")))


def test_an_address_in_use_is_named_in_one_line(stored: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(settings_for(stored.reader_url, ORDERS_API_BIND=address))
    assert line == f"error: ORDERS_API_BIND: cannot listen on {address}: {os.strerror(errno.EADDRINUSE)}"


def test_without_tokens_it_warns(api: Service) -> None:
    [warning] = api.events("no_authentication")
    assert warning["level"] == "warning"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean(mortal: Service, number: signal.Signals) -> None:
    assert mortal.get(PATH).status == 200
    workers = mortal.workers()
    begin = time.monotonic()
    assert mortal.stop(number) == 0
    assert time.monotonic() - begin < 5
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    with pytest.raises(ConnectionRefusedError):
        mortal.get("/livez")


def test_a_stop_finishes_requests_and_does_not_wait_for_idle_connections(stored: Database) -> None:
    with TcpProxy(stored.reader_url) as wire, serving(settings_for(wire.url)) as api, ThreadPoolExecutor(1) as pool:
        assert api.get(PATH).status == 200
        with clients(api, 5, HALF_A_REQUEST), clients(api, 5, b""):
            wire.freeze()
            asked = pool.submit(api.get, PATH)
            wait_for(lambda: api.connections() == 11, 20)
            api.process.terminate()
            wait_for(lambda: not api.accepts(), 20)
            wire.thaw()
            assert asked.result().body == orderlib.encode_order(SAMPLE)
            assert api.process.wait(5) == 0


@pytest.mark.parametrize("sent", [b"", HALF_A_REQUEST, b"G"])
def test_two_hundred_idle_or_half_sent_requests_delay_no_other_client(api: Service, sent: bytes) -> None:
    with clients(api, 200, sent):
        wait_for(lambda: api.connections() == 200, 20)
        assert max(api.get(PATH).seconds for _ in range(30)) < 1


def test_clients_that_do_not_read_delay_no_other_client(api: Service) -> None:
    request = b"GET /orders?limit=100 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before = len(api.events("request"))
    with clients(api, 50, request):
        wait_for(lambda: len(api.events("request")) >= before + 50, 15)
        assert max(api.get(PATH).seconds for _ in range(30)) < 1


ANSWERED = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def assert_served(api: Service) -> None:
    """Assert that both addresses answer a new client within a second."""
    for _ in range(5):
        for path, address in [(PATH, None), ("/livez", None), ("/readyz", None), ("/metrics", api.metrics_address)]:
            answer = api.get(path, address=address)
            assert (answer.status, answer.seconds < 1) == (200, True), (path, answer.seconds)


@pytest.mark.parametrize("sent", [b"", HALF_A_REQUEST, ANSWERED])
def test_two_thousand_idle_connections_lock_no_client_out(api: Service, sent: bytes) -> None:
    with clients(api, 2_000, sent, answered=sent is ANSWERED):
        # A connection is idle once it is accepted: that takes 0.3 s of CPU time, and 2,000 requests take more.
        wait_for(lambda: api.connections() >= 2_000, 20)
        assert_served(api)
    wait_for(lambda: api.connections() == 0, 10)


#: Sends a text over several connections for ever, and reads what is answered.
FLOOD = """
import selectors, socket, sys
host, _, port = sys.argv[1].rpartition(":")
first, repeated = (text.encode().decode("unicode_escape").encode() for text in sys.argv[2:4])
selector = selectors.DefaultSelector()
unsent = {}
for _ in range(6):
    client = socket.create_connection((host, int(port)))
    client.setblocking(False)
    unsent[client] = first
    selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE)
print("flooding", flush=True)
while True:
    for key, events in selector.select():
        client = key.fileobj
        if events & selectors.EVENT_READ and not client.recv(1_000_000):
            sys.exit("the server closed a connection")
        if events & selectors.EVENT_WRITE:
            unsent[client] = unsent[client] or repeated * 1_000
            unsent[client] = unsent[client][client.send(unsent[client]) :]
"""


@pytest.mark.parametrize(
    ("first", "repeated"),
    [
        ("", r"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("", r"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (
            r"GET /records/orders/0/99999?wait=5 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
            r"1\r\na\r\n",
        ),
    ],
    ids=["requests", "reads", "chunks"],
)
def test_what_a_client_sends_at_once_delays_no_other_client_and_takes_little_memory(
    mortal: Service, first: str, repeated: str
) -> None:
    assert_served(mortal)
    [worker] = map(psutil.Process, mortal.workers())
    before = worker.memory_info().rss
    command = [sys.executable, "-c", FLOOD, mortal.address, first, repeated]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as flood:
        assert flood.stdout is not None
        try:
            assert flood.stdout.readline() == b"flooding\n"
            for _ in range(3):
                assert_served(mortal)
                assert worker.memory_info().rss - before < 20_000_000
        finally:
            flood.kill()
    assert mortal.workers() == [worker.pid]


@pytest.mark.parametrize("first", [b"/livez", b"/records/orders/0/99999?wait=0.5"])
def test_a_long_head_after_another_request_is_answered(api: Service, first: bytes) -> None:
    fields = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 8_000) for n in range(6))
    sent = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
    text = sent % (first, fields)
    host, _, port = api.address.rpartition(":")
    for packets in (1, 5):
        with socket.create_connection((host, int(port)), timeout=5) as client:
            for begin in range(0, len(text), len(text) // packets + 1):
                client.sendall(text[begin : begin + len(text) // packets + 1])
                time.sleep(0.02)
            answered = b""
            while answered.count(b"HTTP/1.1 200") < 2:
                received = client.recv(100_000)
                assert received
                answered += received


def limit_files(api: Service, soft: int, hard: int) -> None:
    """Replace its worker by one whose number of open files is limited."""
    assert api.get("/livez").status == 200  # there is a worker
    before = api.workers()
    resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    api.process.send_signal(signal.SIGHUP)
    wait_for(lambda: bool(api.workers()) and not set(api.workers()) & set(before), 20)


def test_at_its_limit_it_closes_the_connections_that_were_idle_longest(mortal: Service) -> None:
    files = 1_024
    limit_files(mortal, files // 2, files)
    used = http.client.HTTPConnection(mortal.address, timeout=20)
    for _ in range(2):
        with clients(mortal, 600, ANSWERED, answered=True):
            # 600 other connections have been idle for longer.
            used.request("GET", PATH)
            assert used.getresponse().read() == orderlib.encode_order(SAMPLE)
            with clients(mortal, 600, b""):
                assert_served(mortal)
                assert files // 2 < mortal.connections() < files
                used.request("GET", PATH)
                assert used.getresponse().read() == orderlib.encode_order(SAMPLE)
        wait_for(lambda: mortal.connections() == 1, 10)
    used.close()
    assert [event for event in mortal.events() if event["level"] == "error"] == []


@pytest.mark.parametrize("flooded_is_api", [True, False], ids=["api", "metrics"])
def test_a_flood_on_one_address_does_not_affect_the_other(mortal: Service, flooded_is_api: bool) -> None:
    # Each address then takes 100 connections.
    limit_files(mortal, 400, 400)
    addresses = (mortal.address, mortal.metrics_address)
    flooded, other = addresses if flooded_is_api else addresses[::-1]
    used = http.client.HTTPConnection(other, timeout=20)
    with ExitStack() as stack:
        stack.callback(used.close)
        used.request("GET", "/livez")
        assert used.getresponse().read() is not None
        host, _, port = flooded.rpartition(":")
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert_served(mortal)
        # It has been idle for longer than all others, and is kept: a request on a closed connection would raise.
        used.request("GET", "/livez")
        assert used.getresponse().status == 200


def test_an_idle_connection_is_kept_as_long_as_its_setting_says(stored: Database) -> None:
    def is_closed(client: socket.socket, within_s: float) -> bool:
        client.settimeout(within_s)
        try:
            return client.recv(1) == b""
        except TimeoutError:
            return False

    with (
        serving(settings_for(stored.reader_url)) as long,
        TcpProxy(stored.reader_url) as wire,
        serving(settings_for(wire.url, ORDERS_API_KEEPALIVE_S="2")) as short,
        clients(long, 1, ANSWERED) as [kept],
        clients(short, 1, ANSWERED) as [closed],
    ):
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        assert closed.recv(65536).startswith(b"HTTP/1.1 200")
        assert is_closed(closed, 5)
        assert not is_closed(kept, 2.5)
        # Each request begins the time anew.
        used = http.client.HTTPConnection(short.address, timeout=20)
        for _ in range(3):
            used.request("GET", "/livez")
            assert used.getresponse().read() is not None
            assert not is_closed(used.sock, 1)
        # While a request is being answered, the connection is not idle.
        used.request("GET", PATH)
        assert used.getresponse().read() == orderlib.encode_order(SAMPLE)
        wire.freeze()
        used.request("GET", PATH)
        assert not is_closed(used.sock, 2.5)
        wire.thaw()
        used.sock.settimeout(20)
        assert used.getresponse().read() == orderlib.encode_order(SAMPLE)
        assert is_closed(used.sock, 5)
        used.close()


UNREADABLE = {
    b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9_000 + b"\r\n\r\n": 431,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: 1\r\n" % n for n in range(200)) + b"\r\n": 431,
    b"nonsense\r\n\r\n": 400,
    b"G\xffT / HTTP/1.1\r\n\r\n": 400,
    b"GET /orders?q=\xff HTTP/1.1\r\nHost: localhost\r\n\r\n": 400,
    b"GET / HTTP/9.9\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nBad header: 1\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: unknown, chunked\r\n\r\n0\r\n\r\n": 501,
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n": 400,
}


def assert_promised(answer: Answer) -> None:
    given = {name.lower(): value for name, value in answer.headers.items()}
    assert {name.lower(): value for name, value in CONSTANT_HEADERS.items()}.items() <= given.items()
    assert answer.headers["X-Request-Id"]
    if answer.status >= 400:
        assert answer.headers["Content-Type"].startswith(("application/problem+json", "text/html"))
    if answer.headers["Content-Type"] == "application/problem+json":
        assert answer.json.items() >= {"status": answer.status, "request_id": answer.headers["X-Request-Id"]}.items()


@pytest.mark.parametrize("sent", UNREADABLE)
def test_invalid_http_gets_a_problem_a_log_line_and_a_count(api: Service, sent: bytes) -> None:
    def counted() -> float:
        lines = api.get("/metrics", address=api.metrics_address).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if "total{" in line and "unreadable" in line)

    before = counted()
    answer = api.raw(sent)
    assert answer.status == UNREADABLE[sent]
    assert_promised(answer)
    assert answer.headers["Connection"] == "close"
    assert abs(parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()) < 60
    line = api.line_of(answer)
    assert (line["route"], line["status"]) == ("unreadable", answer.status)
    assert counted() == before + 1


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT /orders HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    ],
)
def test_no_answer_waits_for_a_body(api: Service, sent: bytes) -> None:
    answer = api.raw(sent)
    assert (answer.status, answer.seconds < 5) == (405, True)
    assert_promised(answer)
    # Otherwise a client would send its next request over a connection that the server closes.
    assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize("asked", [b"", b"Connection: keep-alive\r\n"])
def test_a_client_of_http_1_0_may_read_until_the_end_of_the_connection(api: Service, asked: bytes) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as client:
        client.sendall(b"GET /livez HTTP/1.0\r\nHost: localhost\r\n" + asked + b"\r\n")
        received = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nConnection: close" in head
    assert body == b'{"status":"live"}'


HEADER_NAMES = (
    *(b"Accept", b"Authorization", b"If-None-Match", b"X-Request-Id", b"Cookie", b"Range", b"Expect", b"Upgrade"),
    *(b"Connection", b"Content-Length", b"Transfer-Encoding", b"X-Forwarded-Proto", b"X-Forwarded-For", b"Forwarded"),
)
HEADER_VALUES = st.binary(max_size=40).map(lambda value: value.replace(b"\n", b"")) | st.lists(
    st.sampled_from([b"close", b"keep-alive", b"chunked", b"gzip", b"1", b",", b";", b"q=", b"/", b"*", b"\xe9", b'"']),
    max_size=5,
).map(b"".join)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    method=st.sampled_from([b"GET", b"HEAD", b"OPTIONS", b"WEBSOCKET", b"BREW"]),
    path=st.sampled_from([b"/", b"/orders", b"/orders/%ff", b"/livez", b"*", b"http://x/orders", b"//", b"/%00?a=%ff"]),
    headers=st.lists(st.tuples(st.sampled_from(HEADER_NAMES), HEADER_VALUES), max_size=3),
)
def test_any_request_gets_the_promised_answer(
    api: Service, method: bytes, path: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: localhost", *(b": ".join(header) for header in headers)]
    answer = api.raw(b"\r\n".join([*lines, b"", b""]))
    assert answer.status < 500 or answer.status == 501
    if method != b"HEAD":
        assert_promised(answer)


def test_metrics_need_no_file(stored: Database, tmp_path: Path) -> None:
    """A full disk cannot stop the API, and a SIGKILL leaves no file behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    with serving(settings_for(stored.reader_url, TMPDIR=str(folder), WEB_CONCURRENCY="2")) as api:
        wait_for(lambda: len(api.workers()) == 2, 20)
        for _ in range(10):
            assert api.get(PATH).status == 200
        assert list(folder.iterdir()) == []
        folder.rmdir()
        before = api.workers()
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: len(api.workers()) == 2 and not set(api.workers()) & set(before), 10)
        wait_for(lambda: _answers(api), 20)
        text = api.get("/metrics", address=api.metrics_address).text
        counted = re.findall(r'requests_total{method="GET",route="/orders/{order_uid}",status="200"} (\S+)', text)
        # The count of the last one before the SIGKILL may be lost.
        assert [float(number) >= 10 for number in counted] == [True]
        api.process.kill()
        api.process.wait()
        assert list(tmp_path.iterdir()) == []


def _answers(api: Service) -> bool:
    try:
        return api.get(PATH).status == 200
    except (ConnectionError, http.client.HTTPException):
        return False


def test_a_gunicorn_without_a_required_part_is_named(stored: Database) -> None:
    without = "from gunicorn.workers import gasgi; del gasgi.ASGIWorker._shutdown"
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{without}; from orderlib.entry_point import run; from services.api.__main__ import main; run(main)",
        ],
        env=settings_for(stored.reader_url),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert "has no _shutdown: install the version in requirements/services.txt" in line


def test_clients_that_close_early_leave_nothing_behind(api: Service, stored: Database) -> None:
    for _ in range(5):
        with clients(api, 40, f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()):
            pass
    wait_for(lambda: api.connections() == 0, 20)
    assert api.get(PATH).body == orderlib.encode_order(SAMPLE)
    assert api.events("request_failed") == []
    assert [event for event in api.events("request") if event["status"] == 500] == []
    with psycopg.connect(stored.superuser_url, autocommit=True) as superuser:

        def sessions(state: str) -> int:
            row = superuser.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'orderlib-api' AND state LIKE %s",
                [state],
            ).fetchone()
            assert row is not None
            return int(row[0])

        wait_for(lambda: sessions("%") <= API_CONNECTIONS + HEALTH_CONNECTIONS, 20)
        assert sessions("%transaction%") == 0


def test_a_killed_worker_is_replaced_and_no_client_gets_a_wrong_answer(mortal: Service) -> None:
    assert mortal.get(PATH).status == 200
    [worker] = mortal.workers()
    expected = orderlib.encode_order(SAMPLE)
    stop = threading.Event()
    refusals = (ConnectionError, http.client.HTTPException, TimeoutError)

    def ask() -> int:
        answered = 0
        while not stop.is_set():
            with suppress(*refusals):
                answer = mortal.get(PATH)
                assert (answer.status, answer.body) == (200, expected)
                answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            wait_for(lambda: len(mortal.events("request")) > 20, 20)
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: mortal.workers() not in ([], [worker]), 20)
            before = len(mortal.events("request"))
            wait_for(lambda: len(mortal.events("request")) > before + 50, 10)
        finally:
            stop.set()
        assert all(one.result() > 0 for one in asking)
    text = mortal.get("/metrics", address=mortal.metrics_address).text
    # The counts of the killed worker are not lost.
    assert sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if "requests_total{" in line) >= before


def test_a_reload_replaces_the_workers_and_refuses_no_client(mortal: Service) -> None:
    assert mortal.get(PATH).status == 200
    before = mortal.workers()
    mortal.process.send_signal(signal.SIGHUP)
    statuses: set[int] = set()

    def is_reloaded() -> bool:
        statuses.add(mortal.get(PATH).status)
        return bool(mortal.workers()) and not set(mortal.workers()) & set(before)

    wait_for(is_reloaded, 10)
    assert statuses == {200}


def test_several_workers_serve_and_count_together(stored: Database) -> None:
    with serving(settings_for(stored.reader_url, WEB_CONCURRENCY="2")) as api:
        wait_for(lambda: len(api.workers()) == 2, 20)
        for _ in range(40):
            assert api.get(PATH).status == 200
        count = 'orders_http_requests_total{method="GET",route="/orders/{order_uid}",status="200"} 40.0'
        # The other worker may not have counted its last request yet.
        wait_for(lambda: count in api.get("/metrics", address=api.metrics_address).text, 5)
