"""`make demo`: run all programs on the servers of the sandbox, until Ctrl-C.

It runs the documented commands with the default settings, and needs the variables that `python -m sandbox` sets.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from orderlib.entry_point import StopEvent
from sandbox.server import SandboxError, free_port

ORDERS = 1_000
BAD_RATE = 0.02
#: The consumer of the demo rejects longer records, and one order is longer. The default limit accepts it.
MAX_RECORD_BYTES = 50_000
LONG_ORDER, LONG_ORDER_ITEMS = "long-order", 300
_SAMPLE = Path(__file__).parents[1] / "orderlib" / "testing" / "sample.json"
#: What the status codes of generated items mean.
STATUS_WORDS = "200:new,201:packed,202:accepted,204:delivered,404:not found"
#: The rate of the orders that are sent while the demo runs.
ORDERS_PER_S = 2
READABLE_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0

#: The variables of the operating system that each program gets.
_SYSTEM = {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ"}
_KAFKA = {"ORDERS_KAFKA_BOOTSTRAP_SERVERS", "ORDERS_TOPIC"}
#: The settings that each command gets: only the passwords that it needs.
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
        "ORDERS_TOMBSTONES",
    },
    "api": {
        "ORDERS_API_AUTH",
        "ORDERS_API_BIND",
        "ORDERS_API_KEEPALIVE_S",
        "ORDERS_API_STATUS_WORDS",
        "ORDERS_METRICS_BIND",
        "ORDERS_READER_URL",
    },
    "sender": _KAFKA,
}


#: The settings of the commands to try.
SETTINGS_TO_TRY = {"ORDERS_DATABASE_URL", "ORDERS_READER_URL", "ORDERS_MIGRATOR_URL", *_KAFKA}


def main() -> int:
    """Run the demo. Return the exit status: 0 after Ctrl-C, 1 if a program failed."""
    argparse.ArgumentParser(prog="python -m sandbox.demo", description=__doc__).parse_args()
    stop_event = StopEvent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_event.set())
    address = f"127.0.0.1:{free_port()}"
    environ = {
        **os.environ,
        "ORDERS_API_BIND": address,
        "ORDERS_API_AUTH": "off",
        "ORDERS_API_STATUS_WORDS": STATUS_WORDS,
    }
    try:
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orderlib-demo-")))
            for command in ("bootstrap", "migrate", "topics"):
                _run(f"admin {command}", environ)
            began_s = time.monotonic()
            for service, limit in (("consumer", {"ORDERS_MAX_RECORD_BYTES": str(MAX_RECORD_BYTES)}), ("api", {})):
                service_environ = {**environ, **limit, "ORDERS_METRICS_BIND": f"127.0.0.1:{free_port()}"}
                stack.enter_context(_running(service, service_environ, logs))
            _run(f"sender --count {ORDERS} --bad-rate {BAD_RATE}", environ)
            _run(f"sender --file {_write_long_order(logs)}", environ)
            order = _first(f"http://{address}/orders?limit=1", "orders", stop_event)
            _print_line(
                f"the first order was readable {time.monotonic() - began_s:.1f} s after the services were started"
            )
            stack.enter_context(_running(f"sender --count 1000000 --rate {ORDERS_PER_S}", environ, logs))
            _first(f"http://{address}/rejects?code=too_large", "rejects", stop_event)
            print(_things_to_try(address, order, environ), flush=True)
            _print_line(f"{ORDERS_PER_S} more orders are sent each second; Ctrl-C stops everything")
            while not stop_event.wait(60):
                pass
            _print_line("stopping")
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
    _print_line(f"python -m services.{command}")
    done = subprocess.run(
        [sys.executable, "-m", *f"services.{command}".split()], env=environ_of(command, environ), check=False
    )
    if done.returncode:
        raise SandboxError(f"services.{command} failed with {done.returncode}")


@contextmanager
def _running(command: str, environ: Mapping[str, str], logs: Path) -> Iterator[None]:
    """Run a program during the block, then stop it with SIGTERM. Print the end of its log if it fails."""
    _print_line(f"python -m services.{command} &")
    log_path = logs / f"{command.partition(' ')[0]}.log"
    with log_path.open("ab") as log:
        # In its own process group, so that Ctrl-C reaches only this process, which stops the programs in order.
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
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status != 0:
            print(log_path.read_text(errors="replace")[-4000:], file=sys.stderr)


def _first(url: str, name: str, stop_event: StopEvent) -> dict[str, Any]:
    """Return the first element of a list of the API, as soon as there is one. Raises SandboxError after some time."""
    deadline = time.monotonic() + READABLE_TIMEOUT_S
    while time.monotonic() < deadline and not stop_event.is_set():
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - the URL of the demo's API
            found: list[dict[str, Any]] = json.load(response)[name]
            if found:
                return found[0]
        stop_event.wait(0.05)
    raise SandboxError(f"no {name} were readable within {READABLE_TIMEOUT_S:.0f} s")


def _write_long_order(folder: Path) -> Path:
    order = json.loads(_SAMPLE.read_bytes())
    order["order_uid"] = order["payment"]["transaction"] = LONG_ORDER
    order["items"] *= LONG_ORDER_ITEMS
    path = folder / "long-order.json"
    path.write_text(json.dumps(order) + "\n", encoding="utf-8")
    return path


def _things_to_try(address: str, order: dict[str, Any], environ: Mapping[str, str]) -> str:
    """Return what a person can do now. A test runs the lines that are indented, as they are."""
    python = sys.executable
    with suppress(ValueError):
        python = str(Path(python).relative_to(Path.cwd()))
    python = shlex.quote(python)
    phone = "".join(filter(str.isdigit, order["delivery"]["phone"]))
    settings = sorted(name for name in environ if name in SETTINGS_TO_TRY)
    exports = "\n".join(f"    export {name}={shlex.quote(environ[name])}" for name in settings)
    return f"""
The page of all orders, and one of them:

  http://{address}/
  http://{address}/orders/{order["order_uid"]}

Broken on purpose: about {ORDERS * BAD_RATE:.0f} of the first {ORDERS:,} orders are invalid, and order {LONG_ORDER}
is longer than this consumer accepts (ORDERS_MAX_RECORD_BYTES={MAX_RECORD_BYTES}). They became rejects:

  http://{address}/rejects

To try what follows, open another terminal in this folder and paste these settings:

{exports}

1. Find an order by a phone number. The box on the page does the same.

    curl -s 'http://{address}/search?q={phone}'

2. Look at the rejects that are too large, redrive them with the usual limit, and read the order that is stored now.

    {python} -m services.admin rejects list --code too_large
    {python} -m services.admin rejects redrive --code too_large
    {python} -m services.admin get {LONG_ORDER}

3. Prove that every record in Kafka has an outcome, and that nothing else is stored.

    {python} -m services.admin reconcile
"""


def _print_line(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
