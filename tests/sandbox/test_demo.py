"""`make demo`: each program gets only the variables that it needs, and what it prints can be pasted."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_for

CHECKOUT = Path(__file__).parents[2]
READY_TIMEOUT_S = 120.0
REMOVED_TIMEOUT_S = 5.0
#: Longer than a program needs to stop, and shorter than PostgreSQL is waited for.
STOP_TIMEOUT_S = 8.0

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


def assert_they_work(commands: list[str]) -> None:
    """Paste the settings and the commands into a shell that has no settings of its own."""
    settings = [command for command in commands if command.startswith("export ")]
    tries = commands[len(settings) :]
    assert [command.startswith("curl ") for command in tries] == [True, False, False, False, False]
    script = "\n".join([*settings, *(f"{command} && echo --" for command in tries)])
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    done = subprocess.run(
        ["bash"], input=script, cwd=CHECKOUT, env=environ, capture_output=True, text=True, check=False
    )
    found, listed, redriven, order, proof, _ = [*done.stdout.split("--\n"), ""][:6]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "phone" in found
    assert "too_large" in listed
    outcomes = dict(zip(*(line.split() for line in redriven.splitlines()), strict=True))
    assert outcomes["stored"] == "1"
    assert json.loads(order)["order_uid"] == "long-order"
    assert "records" in proof
    assert "everything is accounted for" in done.stderr


def test_each_program_gets_only_its_variables_the_printed_commands_work_and_ctrl_c_leaves_nothing_behind() -> None:
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")},
        "ORDERS_API_TOKENS": "",
        "SOME_OTHER_SECRET": "hidden",
    }
    demo = subprocess.Popen(
        [sys.executable, "-m", "sandbox", "--", sys.executable, "-m", "sandbox.demo"],
        cwd=CHECKOUT,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen: dict[str, Mapping[str, str]] = {}
    try:

        def have_all_run() -> bool:
            seen.update(programs_below(demo.pid))
            return seen.keys() >= EXPECTED.keys()

        wait_for(have_all_run, READY_TIMEOUT_S, describe=seen.keys)
        for command, names in EXPECTED.items():
            got = seen[command]
            assert {name for name in got if name.endswith("_URL") or name == KAFKA} == names, command
            assert "SOME_OTHER_SECRET" not in got, command
            assert "ORDERS_API_TOKENS" not in got or command == "api", command
        assert demo.stdout is not None
        printed = list(itertools.takewhile(lambda line: "3. Prove" not in line, demo.stdout))
        printed += [demo.stdout.readline() for _ in range(2)]
        assert_they_work([line.strip() for line in printed if line.startswith("    ")])
        family = psutil.Process(demo.pid).children(recursive=True)
        # As a terminal does: to every process in the foreground.
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(READY_TIMEOUT_S) == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        demo.terminate()
        demo.wait(READY_TIMEOUT_S)
        assert demo.stdout is not None
        demo.stdout.close()


@pytest.fixture
def waiting_demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the demo with a folder for temporary files, and a PostgreSQL that does not answer, so that it waits."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        roles = {BOOTSTRAP: "postgres", MIGRATOR: "orders_migrator", WRITER: "orders_writer", READER: "orders_reader"}
        urls = {name: f"postgresql://{role}:password@{server}/orders" for name, role in roles.items()}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
        with subprocess.Popen(
            [sys.executable, "-m", "sandbox.demo"],
            cwd=CHECKOUT,
            env={**inherited, **urls, "TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as demo:
            try:
                yield demo
            finally:
                demo.kill()


def wait_for_program(demo: subprocess.Popen[str]) -> psutil.Process:
    """Wait until the demo runs its first program."""

    def programs() -> list[psutil.Process]:
        below = psutil.Process(demo.pid).children()
        return [process for process in below if "services.admin" in process.cmdline()]

    return wait_for(programs, READY_TIMEOUT_S)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_stops_the_start_of_the_demo_at_once(
    waiting_demo: subprocess.Popen[str], number: signal.Signals, tmp_path: Path
) -> None:
    program = wait_for_program(waiting_demo)
    waiting_demo.send_signal(number)
    _, messages = waiting_demo.communicate(timeout=STOP_TIMEOUT_S)
    assert waiting_demo.returncode == 0
    assert messages.splitlines()[-1] == "demo: stopping"
    assert "readable" not in messages
    assert "failed" not in messages
    assert not program.is_running()
    assert not any(tmp_path.iterdir())


def test_nothing_remains_of_a_demo_that_was_killed(waiting_demo: subprocess.Popen[str], tmp_path: Path) -> None:
    program = wait_for_program(waiting_demo)
    assert any(tmp_path.iterdir())
    waiting_demo.kill()
    psutil.wait_procs([program], timeout=REMOVED_TIMEOUT_S)
    assert not program.is_running() or program.status() == psutil.STATUS_ZOMBIE
    wait_for(lambda: not any(tmp_path.iterdir()), REMOVED_TIMEOUT_S)
