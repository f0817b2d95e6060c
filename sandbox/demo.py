"""`make demo`: the whole way of an order, on the servers of the sandbox, until Ctrl-C.

Runs the documented commands with the usual settings. It needs the variables that `python -m sandbox` sets.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sandbox.server import SandboxError, free_port

ORDERS = 1_000
BAD_RATE = 0.02
#: Orders go on coming at this rate, so that there is something to watch.
ORDERS_PER_S = 2
READABLE_WITHIN_S = 60.0
STOP_WITHIN_S = 15.0

#: What a process of the operating system needs.
_SYSTEM = {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ"}
_KAFKA = {"ORDERS_KAFKA_BOOTSTRAP_SERVERS", "ORDERS_TOPIC"}
#: The variables of each command. A program that does not need a password does not get it.
_NEEDS: Mapping[str, set[str]] = {
    "admin bootstrap": {"ORDERS_BOOTSTRAP_URL", "ORDERS_MIGRATOR_URL", "ORDERS_DATABASE_URL", "ORDERS_READER_URL"},
    "admin migrate": {"ORDERS_MIGRATOR_URL"},
    "admin topics": _KAFKA | {"ORDERS_MAX_RECORD_BYTES"},
    "consumer": _KAFKA
    | {
        "ORDERS_BREAKER_FRACTION",
        "ORDERS_CONSUMER_GROUP",
        "ORDERS_DATABASE_URL",
        "ORDERS_MAX_RECORD_BYTES",
        "ORDERS_METRICS_BIND",
    },
    "api": {
        "ORDERS_API_AUTH",
        "ORDERS_API_BIND",
        "ORDERS_API_KEEPALIVE_S",
        "ORDERS_METRICS_BIND",
        "ORDERS_READER_URL",
    },
    "sender": _KAFKA,
}


def main() -> int:
    """Run it all. Exit status 0 after Ctrl-C, 1 if something failed."""
    argparse.ArgumentParser(prog="python -m sandbox.demo", description=__doc__).parse_args()
    stop_event = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_event.set())
    address = f"127.0.0.1:{free_port()}"
    environ = {**os.environ, "ORDERS_API_BIND": address, "ORDERS_API_AUTH": "off"}
    try:
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orderlib-demo-")))
            for command in ("bootstrap", "migrate", "topics"):
                _run(f"admin {command}", environ)
            began_s = time.monotonic()
            for service, port in (("consumer", free_port()), ("api", free_port())):
                own = {**environ, "ORDERS_METRICS_BIND": f"127.0.0.1:{port}"}
                stack.enter_context(_running(service, own, logs))
            _run(f"sender --count {ORDERS} --bad-rate {BAD_RATE}", environ)
            order_uid = _first_readable_order(f"http://{address}/orders?limit=1", stop_event)
            _say(f"the first order was readable {time.monotonic() - began_s:.1f} s after the services were started")
            stack.enter_context(_running(f"sender --count 1000000 --rate {ORDERS_PER_S}", environ, logs))
            _say(f"{ORDERS_PER_S} more orders a second are on their way; Ctrl-C stops everything")
            _say(f"an order:  http://{address}/orders/{order_uid}")
            _say(f"the page:  http://{address}/")
            stop_event.wait()
            _say("stopping")
    except SandboxError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 0 if stop_event.is_set() else 1
    return 0


def environ_of(command: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a command needs, and no others."""
    needed = next(needed for name, needed in _NEEDS.items() if command == name or command.startswith(f"{name} "))
    prefixes = ("PYTHON", "ORDERS_KAFKA_") if needed >= _KAFKA else ("PYTHON",)
    return {name: value for name, value in environ.items() if name in needed | _SYSTEM or name.startswith(prefixes)}


def _run(command: str, environ: Mapping[str, str]) -> None:
    """Run a program until it ends. Raises SandboxError if it fails."""
    _say(f"python -m services.{command}")
    done = subprocess.run(
        [sys.executable, "-m", *f"services.{command}".split()], env=environ_of(command, environ), check=False
    )
    if done.returncode:
        raise SandboxError(f"services.{command} failed with {done.returncode}")


@contextmanager
def _running(command: str, environ: Mapping[str, str], logs: Path) -> Iterator[None]:
    """Run a program during the block, then stop it cleanly. Print its log if that fails."""
    _say(f"python -m services.{command} &")
    log_path = logs / f"{command.partition(' ')[0]}.log"
    with log_path.open("ab") as log:
        # In a group of its own: Ctrl-C is for us, who stop the sender before the consumer, and that before the servers.
        process = subprocess.Popen(
            [sys.executable, "-m", *f"services.{command}".split()],
            env=environ_of(command, environ),
            stderr=log,
            stdout=log,
            process_group=0,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            status = process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status not in (0, 1):
            print(log_path.read_text(errors="replace")[-4000:], file=sys.stderr)


def _first_readable_order(url: str, stop_event: threading.Event) -> str:
    deadline = time.monotonic() + READABLE_WITHIN_S
    while time.monotonic() < deadline and not stop_event.is_set():
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  the address of the demo's API
            for found in json.load(answer)["orders"]:
                return str(found["order_uid"])
        stop_event.wait(0.05)
    raise SandboxError(f"no order was readable within {READABLE_WITHIN_S:.0f} s")


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
