"""Measure the API beside other applications and servers: ``python -m bench.api``.

Each round starts every variant in a new process and loads them in turns, so that all meet the same changes of the
machine. A figure is the median of all turns. Requests choose orders at random, so no response is cached; all orders fit
into PostgreSQL's shared buffers. The benchmark starts the PostgreSQL that it uses and needs ``wrk`` on PATH. Variants
that need granian or uvloop are left out if it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import attrs
import psutil
from psycopg.conninfo import conninfo_to_dict

import orderlib
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_servers
from orderlib.postgres.connections import open_connection
from orderlib.testing import SAMPLE
from sandbox.server import free_port

ORDERS = 20_000
CONNECTIONS = (1, 16)
WARM_UP_S = 1

UNCACHED = "GET, uncached"
FOUR_QUERIES = "GET, four queries"
NOT_MODIFIED = "GET, 304"
FIXED = "fixed body"
BARE = "fixed body without middleware"


@attrs.frozen
class Variant:
    """An application on a server, and the requests that it gets; the choices are those of ``bench.api_server``."""

    name: str
    application: str
    server: str
    #: A key of ``REQUESTS``.
    requests: str

    @property
    def is_installed(self) -> bool:
        """Whether the optional package that the server needs is installed."""
        return self.server not in ("granian", "uvloop") or importlib.util.find_spec(self.server) is not None


#: What wrk requests, as a Lua script.
REQUESTS = {
    "random": f'request = function() return wrk.format("GET", "/orders/u" .. math.random(0, {ORDERS - 1})) end',
    "known": 'wrk.headers["If-None-Match"] = "*"\nrequest = function() return wrk.format("GET", "/orders/u7") end',
    "list": 'request = function() return wrk.format("GET", "/orders") end',
    "hello": 'request = function() return wrk.format("GET", "/hello") end',
}

VARIANTS = (
    Variant(UNCACHED, "orderlib", "asgi", "random"),
    Variant(FOUR_QUERIES, "four-queries", "asgi", "random"),
    Variant(NOT_MODIFIED, "orderlib", "asgi", "known"),
    Variant("list of 20 orders", "orderlib", "asgi", "list"),
    Variant(FIXED, "orderlib", "asgi", "hello"),
    Variant(BARE, "bare", "asgi", "hello"),
    Variant("GET, four queries, orderlib's driver", "four-queries-own-driver", "asgi", "random"),
    Variant("GET, uncached, uvloop", "orderlib", "uvloop", "random"),
    Variant("fixed body, uvloop", "orderlib", "uvloop", "hello"),
    Variant("GET, uncached, WSGI, gunicorn sync", "wsgi", "sync", "random"),
    Variant("fixed body, WSGI, gunicorn sync", "wsgi", "sync", "hello"),
    Variant("GET, uncached, WSGI, gunicorn gthread", "wsgi", "gthread", "random"),
    Variant("fixed body, WSGI, gunicorn gthread", "wsgi", "gthread", "hello"),
    Variant("GET, uncached, WSGI, granian", "wsgi", "granian", "random"),
    Variant("GET, uncached, ASGI, granian", "orderlib", "granian", "random"),
    Variant("fixed body, ASGI, granian", "orderlib", "granian", "hello"),
)


@attrs.frozen(kw_only=True)
class WrkResult:
    """One run of wrk."""

    per_s: float
    p50_ms: float
    p99_ms: float
    #: CPU time per request of the server's processes, without PostgreSQL's. It varies less than the other values.
    cpu_us: float


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.api", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the measurement (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each variant in a round (%(default)s)")
    parser.add_argument("--seconds", type=int, default=1, help="duration of each measurement (%(default)s)")
    parser.add_argument("--only", default="", help="measure only the variants that have this text in their name")
    add_write_option(parser)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: bench.api needs wrk (apt-get install wrk)")
    with benchmark_servers() as environ:
        results = measure(environ, options)
    publish("api", list(figures(results)), write=options.write)


def measure(environ: Mapping[str, str], options: argparse.Namespace) -> dict[tuple[str, int], list[WrkResult]]:
    """Measure every variant with the PostgreSQL of this environment. Return the results of all turns."""
    prepare(environ)
    results: dict[tuple[str, int], list[WrkResult]] = {}
    variants = [variant for variant in VARIANTS if options.only in variant.name and variant.is_installed]
    for number in range(options.rounds):
        print_progress(f"the API, round {number + 1} of {options.rounds}")
        servers = [(variant.name, REQUESTS[variant.requests], serving(environ, variant)) for variant in variants]
        measure_in_turns(servers, CONNECTIONS, options.turns, options.seconds, results)
    return results


def measure_in_turns(
    servers: Sequence[tuple[str, str, AbstractContextManager[tuple[int, psutil.Process]]]],
    connections: Sequence[int],
    turns: int,
    seconds: int,
    results: dict[tuple[str, int], list[WrkResult]],
) -> None:
    """Start the servers, each with its name and a Lua script of requests, and load one after another, in several turns.

    Add the results by name and number of connections.
    """
    with ExitStack() as stack:
        running = [(name, requests, *stack.enter_context(server)) for name, requests, server in servers]
        for _, requests, port, process in running:
            run_wrk(port, process, requests, max(connections), WARM_UP_S)
        for _ in range(turns):
            for count in connections:
                for name, requests, port, process in running:
                    result = run_wrk(port, process, requests, count, seconds)
                    results.setdefault((name, count), []).append(result)
                    print_progress(f"{name}, {_count(count)}: {result.per_s:,.0f}/s")


def figures(results: Mapping[tuple[str, int], list[WrkResult]]) -> Iterator[Figure]:
    """Yield the ratios, each as the median of those of the turns, then the median of each value."""

    def ratio(
        name: str, connections: int, variants: tuple[str, ...], of_turn: Callable[..., float], **limits: float
    ) -> Iterator[Figure]:
        turns = [results.get((variant, connections), []) for variant in variants]
        if all(turns):
            value = statistics.median(of_turn(*same_turn) for same_turn in zip(*turns, strict=True))
            yield Figure(f"{name}, {_count(connections)}", value, "×", **limits)

    for connections in CONNECTIONS:
        variants = (UNCACHED, FOUR_QUERIES)
        yield from ratio(
            "GET, uncached / four queries", connections, variants, lambda a, b: a.per_s / b.per_s, at_least=1.4
        )
    yield from ratio(
        "time of a 304 / of a GET, uncached",
        16,
        (NOT_MODIFIED, UNCACHED),
        lambda not_modified, uncached: uncached.per_s / not_modified.per_s,
        at_most=0.6,
        goal=0.5,
    )
    yield from ratio(
        "CPU of log, metrics and access check / of a GET, uncached",
        16,
        (FIXED, BARE, UNCACHED),
        lambda fixed, bare, uncached: (fixed.cpu_us - bare.cpu_us) / uncached.cpu_us,
        at_most=0.15,
        goal=0.1,
    )
    for (name, connections), turns in results.items():
        prefix = f"{name}, {_count(connections)}"
        yield Figure(prefix, statistics.median(result.per_s for result in turns), "/s")
        yield Figure(f"{prefix}, p50", statistics.median(result.p50_ms for result in turns), "ms")
        yield Figure(f"{prefix}, p99", statistics.median(result.p99_ms for result in turns), "ms")
        yield Figure(f"{prefix}, CPU of the server", statistics.median(result.cpu_us for result in turns), "µs")


def _count(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


def prepare(environ: Mapping[str, str]) -> None:
    """Create the roles, the tables and the orders."""
    urls = [environ[f"ORDERS_{name}_URL"] for name in ("MIGRATOR", "DATABASE", "READER")]
    passwords = {str(url["user"]): str(url["password"]) for url in map(conninfo_to_dict, urls)}
    orderlib.bootstrap(
        environ["ORDERS_BOOTSTRAP_URL"],
        migrator_password=passwords["orders_migrator"],
        writer_password=passwords["orders_writer"],
        reader_password=passwords["orders_reader"],
    )
    orderlib.migrate(environ["ORDERS_MIGRATOR_URL"])
    sample = orderlib.decode_order(SAMPLE)
    with orderlib.connect(environ["ORDERS_DATABASE_URL"]) as repository:
        for begin in range(0, ORDERS, 2000):
            repository.save_many(
                attrs.evolve(sample, order_uid=f"u{n}", items=[sample.items[0]] * (n % 3 + 1))
                for n in range(begin, begin + 2000)
            )
    with open_connection(environ["ORDERS_BOOTSTRAP_URL"], application_name="bench") as superuser:
        superuser.execute("VACUUM ANALYZE")


@contextmanager
def serving(environ: Mapping[str, str], variant: Variant) -> Iterator[tuple[int, psutil.Process]]:
    """Run a variant as a process, and yield its port and the process once it accepts connections."""
    port = free_port()
    command = [sys.executable, "-m", "bench.api_server", variant.application, variant.server, str(port)]
    with listening(port, command, environ) as process:
        yield port, process


@contextmanager
def listening(port: int, command: list[str], environ: Mapping[str, str]) -> Iterator[psutil.Process]:
    """Run a server as a process, and yield the process once it accepts connections."""
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
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(15)


def run_wrk(port: int, process: psutil.Process, requests: str, connections: int, seconds: int) -> WrkResult:
    """Load the server with wrk for this time. ``requests`` is a Lua script."""
    cpu_s = _cpu_s(process)
    text = _wrk_output(requests, connections, f"http://127.0.0.1:{port}", seconds)
    cpu_s = _cpu_s(process) - cpu_s
    found = re.search(r"(\d+) requests in .*Requests/sec:\s+([\d.]+)", text, re.DOTALL)
    assert found, text
    return WrkResult(
        per_s=float(found[2]),
        p50_ms=_percentile(text, 50),
        p99_ms=_percentile(text, 99),
        cpu_us=cpu_s / int(found[1]) * 1_000_000,
    )


def _wrk_output(requests: str, connections: int, url: str, seconds: int) -> str:
    """Run wrk, and return what it prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        # Without a seed, each run would repeat the requests of the one before.
        script.write(f"math.randomseed({random.randrange(2**31)})\n{requests}")
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", "--latency", "-s", script.name, f"-d{seconds}s", url]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "Non-2xx" not in text, text
    assert "Socket errors" not in text, text
    return text


def _cpu_s(process: psutil.Process) -> float:
    """Return the CPU time that a process and its children have used so far."""
    used = (each.cpu_times() for each in [process, *process.children(recursive=True)])
    return sum(times.user + times.system for times in used)


def _percentile(text: str, percent: int) -> float:
    found = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", text)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1, "s": 1000}[found[2]]


if __name__ == "__main__":
    main()
