"""How fast the API answers, beside other ways of doing the same: ``python -m bench.api``.

Starts the servers that it uses, and no other. Needs ``wrk`` on PATH; granian and uvloop are measured where they are
installed. Each way is measured several times, in turns, with a new process each time; the median counts. Orders are
asked for at random, so that each is read anew; all of them fit into PostgreSQL's memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
import psutil
from psycopg.conninfo import conninfo_to_dict

import orderlib
from bench.report import Figure, add_write_option, publish
from bench.servers import own_servers
from orderlib.postgres.connections import connect
from orderlib.postgres.migrate import bootstrap, migrate
from orderlib.testing import SAMPLE

ORDERS = 20_000
CONNECTIONS = (1, 16)

OURS = "GET, uncached"
FOUR = "GET, four queries"
#: name, application, server, what is asked for
WAYS = (
    (OURS, "ours", "asgi", "random"),
    (FOUR, "four", "asgi", "random"),
    ("GET, 304", "ours", "asgi", "known"),
    ("list of 20 orders", "ours", "asgi", "list"),
    ("fixed body", "ours", "asgi", "hello"),
    ("GET, four queries over our driver", "four-ours", "asgi", "random"),
    ("GET, uncached, uvloop", "ours", "uvloop", "random"),
    ("fixed body, uvloop", "ours", "uvloop", "hello"),
    ("GET, uncached, WSGI, gunicorn sync", "wsgi", "sync", "random"),
    ("fixed body, WSGI, gunicorn sync", "wsgi", "sync", "hello"),
    ("GET, uncached, WSGI, gunicorn gthread", "wsgi", "gthread", "random"),
    ("fixed body, WSGI, gunicorn gthread", "wsgi", "gthread", "hello"),
    ("GET, uncached, WSGI, granian", "wsgi", "granian", "random"),
    ("GET, uncached, ASGI, granian", "ours", "granian", "random"),
    ("fixed body, ASGI, granian", "ours", "granian", "hello"),
)


@attrs.frozen(kw_only=True)
class Measured:
    """One run of wrk."""

    per_s: float
    p50_ms: float
    p99_ms: float
    #: What a request cost the server's own processes; PostgreSQL's work is not in it. Steadier than the rest.
    cpu_us: float


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.api", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (%(default)s)")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    add_write_option(parser)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: bench.api needs wrk (apt-get install wrk)")
    with own_servers() as environ:
        measured = measure(environ, options)
    publish("api", list(figures(measured)), write=options.write)


def measure(environ: Mapping[str, str], options: argparse.Namespace) -> dict[tuple[str, int], list[Measured]]:
    """Measure every way of serving, on the servers of this environment."""
    prepare(environ)
    measured: dict[tuple[str, int], list[Measured]] = {}
    for _ in range(options.rounds):
        for name, application, server, asked in WAYS:
            if options.only not in name or not _is_there(server):
                continue
            with serving(environ, application, server) as (port, process):
                for connections in CONNECTIONS:
                    found = ask(port, process, asked, connections, options.seconds)
                    measured.setdefault((name, connections), []).append(found)
                    print(f"{name}, {connections} connections: {found.per_s:,.0f}/s", file=sys.stderr)
    return measured


def figures(measured: Mapping[tuple[str, int], list[Measured]]) -> Iterator[Figure]:
    """The medians, and how much faster ours is than four queries: each round compared with itself, then the median."""
    for connections in CONNECTIONS:
        ours, four = measured.get((OURS, connections)), measured.get((FOUR, connections))
        if ours and four:
            ratio = statistics.median(a.per_s / b.per_s for a, b in zip(ours, four, strict=True))
            yield Figure(f"GET, uncached / four queries, {connections} conn.", ratio, "times", at_least=1.4)
    for (name, connections), runs in measured.items():
        what = f"{name}, {connections} conn."
        yield Figure(what, statistics.median(one.per_s for one in runs), "/s")
        yield Figure(f"{what}, p50", statistics.median(one.p50_ms for one in runs), "ms")
        yield Figure(f"{what}, p99", statistics.median(one.p99_ms for one in runs), "ms")
        yield Figure(f"{what}, server's CPU", statistics.median(one.cpu_us for one in runs), "µs")


def _is_there(server: str) -> bool:
    return server not in ("granian", "uvloop") or importlib.util.find_spec(server) is not None


def prepare(environ: Mapping[str, str]) -> None:
    """Make the roles, the tables and the orders, unless they are there."""
    urls = [environ[f"ORDERS_{name}_URL"] for name in ("MIGRATOR", "DATABASE", "READER")]
    passwords = {str(url["user"]): str(url["password"]) for url in map(conninfo_to_dict, urls)}
    with connect(environ["ORDERS_BOOTSTRAP_URL"], application_name="bench") as superuser:
        bootstrap(superuser, passwords)
    with connect(environ["ORDERS_MIGRATOR_URL"], application_name="bench") as migrator:
        migrate(migrator)
    sample = orderlib.decode_order(SAMPLE)
    with orderlib.connect(environ["ORDERS_DATABASE_URL"]) as repository:
        for begin in range(0, ORDERS, 2000):
            repository.save_many(
                attrs.evolve(sample, order_uid=f"u{n}", items=[sample.items[0]] * (n % 3 + 1))
                for n in range(begin, begin + 2000)
            )
    with connect(environ["ORDERS_BOOTSTRAP_URL"], application_name="bench") as superuser:
        superuser.execute("VACUUM ANALYZE")


@contextmanager
def serving(environ: Mapping[str, str], application: str, server: str) -> Iterator[tuple[int, psutil.Process]]:
    """One process of a way of serving, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.api_server", application, server, str(port)]
    process = subprocess.Popen(command, env=dict(environ))
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(15)


def ask(port: int, process: psutil.Process, asked: str, connections: int, seconds: int) -> Measured:
    """Load it for so long."""
    scripts = {
        "random": f'request = function() return wrk.format("GET", "/orders/u" .. math.random(0, {ORDERS - 1})) end',
        "known": 'wrk.headers["If-None-Match"] = "*"\nrequest = function() return wrk.format("GET", "/orders/u7") end',
        "list": 'request = function() return wrk.format("GET", "/orders") end',
        "hello": 'request = function() return wrk.format("GET", "/hello") end',
    }
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(scripts[asked])
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", "--latency", "-s", script.name, f"http://127.0.0.1:{port}"]
        subprocess.run([*command, "-d1s"], capture_output=True, check=True)
        cpu_s = _cpu_s(process)
        text = subprocess.run([*command, f"-d{seconds}s"], capture_output=True, check=True, text=True).stdout
    assert "Non-2xx" not in text, text
    assert "Socket errors" not in text, text
    cpu_s = _cpu_s(process) - cpu_s
    found = re.search(r"(\d+) requests in .*Requests/sec:\s+([\d.]+)", text, re.DOTALL)
    assert found, text
    return Measured(
        per_s=float(found[2]),
        p50_ms=_percentile(text, 50),
        p99_ms=_percentile(text, 99),
        cpu_us=cpu_s / int(found[1]) * 1_000_000,
    )


def _cpu_s(process: psutil.Process) -> float:
    """What a process and those it started have used so far."""
    used = (one.cpu_times() for one in [process, *process.children(recursive=True)])
    return sum(times.user + times.system for times in used)


def _percentile(text: str, percent: int) -> float:
    found = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", text)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1, "s": 1000}[found[2]]


if __name__ == "__main__":
    main()
