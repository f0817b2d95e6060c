"""`make demo`: each program gets only the variables that it needs."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from sandbox import Sandbox
from tests.conftest import Database
from tests.support.process_table import eventually

CHECKOUT = Path(__file__).parents[2]
READY_TIMEOUT_S = 120.0

BOOTSTRAP, MIGRATOR, WRITER, READER = (f"ORDERS_{name}_URL" for name in ("BOOTSTRAP", "MIGRATOR", "DATABASE", "READER"))
KAFKA = "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
#: The settings with secrets or addresses of servers that each command must get.
EXPECTED = {
    "admin bootstrap": {BOOTSTRAP, MIGRATOR, WRITER, READER},
    "admin migrate": {MIGRATOR},
    "admin topics": {KAFKA},
    "consumer": {WRITER, KAFKA},
    "api": {READER},
    "sender": {KAFKA},
}


def programs_below(pid: int) -> dict[str, Mapping[str, str]]:
    """Return the environment of each program that runs below a process now."""
    found: dict[str, Mapping[str, str]] = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                command = re.search(r"services\.(admin \w+|\w+)", " ".join(process.cmdline()))
                environ = process.environ()
                if command and environ:
                    found[command[1]] = environ
    return found


def test_each_program_of_the_demo_gets_only_its_variables(sandbox: Sandbox, empty_database: Database) -> None:
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")},
        **empty_database.environ(),
        KAFKA: sandbox.kafka.bootstrap_servers,
        "ORDERS_TOPIC": f"demo-{secrets.token_hex(6)}",
        "ORDERS_API_TOKENS": "",
        "SOME_OTHER_SECRET": "hidden",
    }
    demo = subprocess.Popen([sys.executable, "-m", "sandbox.demo"], cwd=CHECKOUT, env=environ, stderr=subprocess.PIPE)
    seen: dict[str, Mapping[str, str]] = {}
    try:

        def have_all_run() -> bool:
            seen.update(programs_below(demo.pid))
            return seen.keys() >= EXPECTED.keys()

        assert eventually(have_all_run, READY_TIMEOUT_S), seen.keys()
        for command, names in EXPECTED.items():
            got = seen[command]
            assert {name for name in got if name.endswith("_URL") or name == KAFKA} == names, command
            assert "SOME_OTHER_SECRET" not in got, command
            assert "ORDERS_API_TOKENS" not in got or command == "api", command
        assert demo.stderr is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while (line := demo.stderr.readline()) and b"the page:" not in line:
            assert time.monotonic() < deadline_s
        assert line, "the demo ended early"
        demo.send_signal(signal.SIGINT)
        assert demo.wait(READY_TIMEOUT_S) == 0
        assert programs_below(demo.pid) == {}
    finally:
        demo.terminate()
        demo.wait(READY_TIMEOUT_S)
        assert demo.stderr is not None
        demo.stderr.close()
