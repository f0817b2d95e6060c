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
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from orderlib.entry_point import StopEvent, set_up_streams
from sandbox.guard import MARK_PREFIX, Guard
from sandbox.server import SandboxError, free_port, temporary_path
from sandbox.signals import on_stop_signals

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
#: How soon a stop request reaches the running program.
STOP_POLL_S = 0.02

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


class _Stopped(Exception):
    """A stop was requested while the demo started."""


def main() -> int:
    """Run the demo. Return the exit status: 0 after Ctrl-C, 1 if a program failed."""
    argparse.ArgumentParser(prog="python -m sandbox.demo", description=__doc__).parse_args()
    set_up_streams()  # after the end of the terminal, the programs must still be stopped
    stop_event = StopEvent()
    on_stop_signals(lambda *_: stop_event.set())
    try:
        with ExitStack() as stack:
            folder, marks = stack.enter_context(_guarded_folder())
            with suppress(_Stopped):
                _start(stack, {**os.environ, **marks}, folder, stop_event)
                while not stop_event.wait(60):
                    pass
            _print_line("stopping")
    except SandboxError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _guarded_folder() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Create a temporary folder, and remove it at the end. If this process is killed, a guard does that.

    The guard also ends the programs then. Yields the folder, and the variables by which the guard finds them.
    """
    folder = temporary_path("orderlib-demo-")
    guard = Guard(signal.SIGTERM, folder=folder, find_orphans=True)
    guard.watch(os.getpid())
    folder.mkdir(mode=0o700)
    try:
        yield folder, guard.environ
    finally:
        guard.watch(0)
        guard.end()


def _start(stack: ExitStack, environ: Mapping[str, str], folder: Path, stop_event: StopEvent) -> None:
    """Start all programs, and print what a person can do. Raises _Stopped if a stop is requested before the end."""
    address = f"127.0.0.1:{free_port()}"
    environ = {
        **environ,
        "ORDERS_API_BIND": address,
        "ORDERS_API_AUTH": "off",
        "ORDERS_API_STATUS_WORDS": STATUS_WORDS,
    }
    for command in ("bootstrap", "migrate", "topics"):
        _run(f"admin {command}", environ, stop_event)
    began_s = time.monotonic()
    for service, limit in (("consumer", {"ORDERS_MAX_RECORD_BYTES": str(MAX_RECORD_BYTES)}), ("api", {})):
        service_environ = {**environ, **limit, "ORDERS_METRICS_BIND": f"127.0.0.1:{free_port()}"}
        stack.enter_context(_running(service, service_environ, folder, stop_event))
    _run(f"sender --count {ORDERS} --bad-rate {BAD_RATE}", environ, stop_event)
    _run(f"sender --file {_write_long_order(folder)}", environ, stop_event)
    order = _first(f"http://{address}/orders?limit=1", "orders", stop_event)
    _print_line(f"the first order was readable {time.monotonic() - began_s:.1f} s after the services were started")
    stack.enter_context(_running(f"sender --count 1000000 --rate {ORDERS_PER_S}", environ, folder, stop_event))
    _first(f"http://{address}/rejects?code=too_large", "rejects", stop_event)
    print(_things_to_try(address, order, environ), flush=True)
    _print_line(f"{ORDERS_PER_S} more orders are sent each second; Ctrl-C stops everything")


def environ_of(command: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a command needs, and no others."""
    needed = next(needed for name, needed in _NEEDS.items() if command == name or command.startswith(f"{name} "))
    prefixes = ("PYTHON", MARK_PREFIX, *(("ORDERS_KAFKA_",) if needed >= _KAFKA else ()))
    return {name: value for name, value in environ.items() if name in needed | _SYSTEM or name.startswith(prefixes)}


def _run(command: str, environ: Mapping[str, str], stop_event: StopEvent) -> None:
    """Run a program until it ends. Raises SandboxError if it fails, and _Stopped after stopping it on request."""
    _raise_if_stopped(stop_event)
    _print_line(f"python -m services.{command}")
    process = _spawn(command, environ)
    while not stop_event.is_set():
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_POLL_S)
            break
    status = _stop(process)
    _raise_if_stopped(stop_event)
    if status:
        raise SandboxError(f"services.{command} failed with {status}")


@contextmanager
def _running(command: str, environ: Mapping[str, str], logs: Path, stop_event: StopEvent) -> Iterator[None]:
    """Run a program during the block, then stop it with SIGTERM. Print the end of its log if it fails."""
    _raise_if_stopped(stop_event)
    _print_line(f"python -m services.{command} &")
    log_path = logs / f"{command.partition(' ')[0]}.log"
    with log_path.open("ab") as log:
        process = _spawn(command, environ, log)
    try:
        yield
    finally:
        # A program that is still importing its modules does not handle SIGTERM yet.
        if _stop(process) not in (0, -signal.SIGTERM):
            print(log_path.read_text(errors="replace")[-4000:], file=sys.stderr)


def _spawn(command: str, environ: Mapping[str, str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *f"services.{command}".split()],
        env=environ_of(command, environ),
        stderr=log,
        stdout=log,
        # In its own process group, so that Ctrl-C reaches only this process, which stops the programs in order.
        process_group=0,
    )


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a program if it runs, and return its exit status."""
    process.terminate()
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _raise_if_stopped(stop_event: StopEvent) -> None:
    if stop_event.is_set():
        raise _Stopped


def _first(url: str, name: str, stop_event: StopEvent) -> dict[str, Any]:
    """Return the first element of a list of the API, as soon as there is one.

    Raises SandboxError after some time, and _Stopped on request.
    """
    deadline = time.monotonic() + READABLE_TIMEOUT_S
    while time.monotonic() < deadline and not stop_event.is_set():
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - the URL of the demo's API
            found: list[dict[str, Any]] = json.load(response)[name]
            if found:
                return found[0]
        stop_event.wait(0.05)
    _raise_if_stopped(stop_event)
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
