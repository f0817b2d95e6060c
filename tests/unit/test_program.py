"""What a program writes to stderr, and its exit status."""

from __future__ import annotations

import datetime as dt
import errno
import io
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import structlog

from orderlib import ConfigurationError, DatabaseUnavailable, OrderlibError, RefusedByDatabase
from orderlib.entry_point import StopEvent, run
from services import program
from services.program import event, log_events, set_up_logging

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class FullDisk(io.StringIO):
    """A stream that cannot be written."""

    def write(self, _text: str) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def _restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset structlog, logging and what writes events, because a program sets them up once."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(program, "_write", program._write)
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def main() -> NoReturn:
        raise error

    return main


# Logs


def test_an_event_is_one_line_of_json_with_its_fields() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    event("batch_stored", partition=3, next_offset=17, order_uid="b563", note='a "quoted"\nline')
    [line] = stream.getvalue().splitlines()
    logged = json.loads(line)
    assert dt.datetime.fromisoformat(logged.pop("time")).utcoffset() == dt.timedelta()
    assert logged == {
        "level": "info",
        "event": "batch_stored",
        "partition": 3,
        "next_offset": 17,
        "order_uid": "b563",
        "note": 'a "quoted"\nline',
    }


def test_fields_of_any_type_can_be_logged() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    event("odd", where=Path("a"), partitions={2}, error=DatabaseUnavailable("timeout"))
    logged = json.loads(stream.getvalue())
    assert (logged["where"], logged["partitions"], logged["error"]) == ("a", [2], "timeout")


def test_a_terminal_gets_a_readable_format() -> None:
    stream = Terminal()
    set_up_logging(stream)
    event("batch_stored", level=logging.WARNING, partition=3)
    event("idle")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[warning  \] batch_stored +partition=3", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[info     \] idle *", second)


def test_only_warnings_of_libraries_become_events() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    logging.getLogger("psycopg.pool").info("chatter")
    logging.getLogger("psycopg.pool").warning("error connecting in %r", "pool")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["error connecting in 'pool'"]


def test_an_exception_of_a_library_is_a_field() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    try:
        raise DatabaseUnavailable("timeout")
    except DatabaseUnavailable:
        logging.getLogger("library").exception("stopped")
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("DatabaseUnavailable: timeout")


def test_events_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    set_up_logging(stream, logging.WARNING)
    event("hidden")
    event("shown", logging.ERROR)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["shown"]


def test_several_events_are_written_together_as_far_as_a_pipe_keeps_them_whole() -> None:
    class Parts(io.StringIO):
        """A stream that remembers the parts that were written."""

        def __init__(self) -> None:
            super().__init__()
            self.parts: list[str] = []

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    stream = Parts()
    set_up_logging(stream)
    notes = ["a" * 100] * 100 + ["b" * select.PIPE_BUF] + ["c"]
    log_events((logging.INFO, "request", {"number": number, "note": note}) for number, note in enumerate(notes))
    logged = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(found["number"], found["note"]) for found in logged] == list(enumerate(notes))
    assert len(stream.parts) < 10
    assert all(part.endswith("\n") for part in stream.parts)
    assert [part.count("\n") for part in stream.parts if len(part) > select.PIPE_BUF] == [1]


def test_several_events_are_lines_on_a_terminal_too() -> None:
    stream = Terminal()
    set_up_logging(stream)
    log_events([(logging.INFO, "first", {}), (logging.WARNING, "second", {"partition": 3})])
    first, second = stream.getvalue().splitlines()
    assert "[info     ] first" in first
    assert re.search(r"\[warning  \] second +partition=3$", second)


def test_a_line_that_cannot_be_written_is_lost_and_raises_nothing() -> None:
    set_up_logging(FullDisk())
    event("lost")
    logging.getLogger("library").warning("lost")


# Stop requests


def test_a_signal_ends_the_wait_for_a_stop_request() -> None:
    stop_event = StopEvent()
    before = signal.signal(signal.SIGUSR1, lambda *_: stop_event.set())
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert stop_event.wait(60)
        assert stop_event.is_set()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_wait_without_a_stop_request_ends_in_time() -> None:
    assert not StopEvent().wait(0.01)


@pytest.mark.parametrize("name", ["consumer", "api"])
def test_sigterm_ends_a_service_with_0_while_it_imports_its_modules(name: str, tmp_path: Path) -> None:
    (tmp_path / "attrs.py").write_text("import sys\nprint('importing', flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [sys.executable, "-m", f"services.{name}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.terminate()
        assert process.wait(60) == 0


# Exit statuses


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_exit_status_is_the_one_that_the_program_returns(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: status) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigurationError("ORDERS_TOPIC is not set"), 2, "error: ORDERS_TOPIC is not set\n"),
        (DatabaseUnavailable("PostgreSQL: timeout"), 1, "error: PostgreSQL: timeout\n"),
        (
            RefusedByDatabase("23514", "b563"),
            1,
            "error: refused_by_database: $: expected order b563 that PostgreSQL accepts, found SQLSTATE 23514\n",
        ),
        (OrderlibError("any other error"), 1, "error: any other error\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
    ],
)
def test_an_error_of_orderlib_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_any_other_exception_is_a_bug_and_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line_and_a_status(unbuffered: str) -> None:
    program = "import sys; from orderlib.entry_point import run; sys.exit(run(lambda: print('an order') or 0))"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_closed_pipe_gives_no_traceback() -> None:
    program = (
        "import sys\n"
        "from orderlib.entry_point import run\n"
        "def main():\n"
        "    while True:\n"
        "        print('an order')\n"
        "sys.exit(run(main))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "an order\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(10) == 1


@pytest.mark.parametrize("stderr", ["a full disk", "a pipe without a reader"])
@pytest.mark.parametrize("program", ["consumer", "api", "sender", "admin forgotten", "admin get x --no-such-option"])
def test_a_configuration_error_that_stderr_cannot_take_still_exits_with_2(program: str, stderr: str) -> None:
    name, *arguments = program.split()
    if stderr == "a full disk":
        unwritable = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, unwritable = os.pipe()
        os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"services.{name}", *arguments],
            cwd=ROOT,
            env={},
            stdout=subprocess.PIPE,
            stderr=unwritable,
            check=False,
        )
    finally:
        os.close(unwritable)
    assert (done.returncode, done.stdout) == (2, b"")


def test_what_stderr_cannot_take_is_lost_and_the_program_continues() -> None:
    code = (
        "import sys; from orderlib.entry_point import *; set_up_streams(); "
        "print('lost', file=sys.stderr, flush=True); sys.exit(run(lambda: print('out') or 7))"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (7, b"out\n")


def read_available(fd: int) -> bytes:
    """Read what a pipe or terminal has now."""
    found = b""
    while select.select([fd], [], [], 0)[0]:
        found += os.read(fd, 65_536)
    return found


def open_sockets() -> tuple[int, int]:
    """Return both ends of a pair of sockets: systemd gives its services one as stderr."""
    reading, writing = socket.socketpair()
    return reading.detach(), writing.detach()


#: Fills stderr, says so, and writes once more when asked.
FILLS_STDERR = """
import sys
from orderlib.entry_point import run
from services.program import *
set_up_logging()
def main():
    for number in range(30_000):
        event("line", number=number)
    print("full", flush=True)
    sys.stdin.readline()
    log_events([(logging.INFO, "last", {"note": "a" * 10_000})])
    return 7
sys.exit(run(main))
"""


@pytest.mark.parametrize("open_ends", [os.pipe, open_sockets], ids=["pipe", "socket"])
def test_a_stalled_reader_of_the_log_does_not_stop_a_program_and_is_told_how_many_lines_it_missed(
    open_ends: Callable[[], tuple[int, int]],
) -> None:
    reading, writing = open_ends()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", FILLS_STDERR],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=writing,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"full\n"
            # Other processes share it, and may not expect that a write fails.
            assert os.get_blocking(writing)
            *whole, _ = read_available(reading).split(b"\n")
            process.stdin.write(b"\n")
            process.stdin.close()
            assert process.wait(60) == 7
        numbers = [json.loads(line)["number"] for line in whole]
        lost, last = map(json.loads, read_available(reading).splitlines())
    finally:
        os.close(reading)
        os.close(writing)
    assert numbers == list(range(len(numbers)))
    assert (lost["event"], lost["level"], lost["lines"]) == ("log_lines_lost", "warning", 30_000 - len(numbers))
    assert last["note"] == "a" * 10_000


def test_a_terminal_that_shows_nothing_does_not_stop_a_program() -> None:
    screen, terminal = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", FILLS_STDERR],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal,
            timeout=60,
            check=False,
        )
    finally:
        os.close(screen)
        os.close(terminal)
    assert (done.returncode, done.stdout) == (7, b"full\n")


@pytest.mark.parametrize("open_ends", [os.pipe, open_sockets], ids=["pipe", "socket"])
def test_a_log_with_a_reader_is_complete(open_ends: Callable[[], tuple[int, int]]) -> None:
    reading, writing = open_ends()
    code = FILLS_STDERR.replace("30_000", "3_000")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=writing) as process:
        os.close(writing)
        with open(reading, "rb") as log:  # noqa: PTH123 - a file descriptor
            lines = log.read().splitlines()
        assert process.wait(60) == 7
    assert [json.loads(line).get("number") for line in lines] == [*range(3_000), None]


def test_a_log_in_a_file_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    code = FILLS_STDERR.replace("30_000", "30")
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=b"", stderr=file, check=False)
    before, *lines = path.read_text().splitlines()
    assert before == "before"
    assert [json.loads(line).get("number") for line in lines] == [*range(30), None]


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_not_make_a_program_fail(closed: str) -> None:
    code = (
        "import sys; from orderlib.entry_point import run; from services.program import *; set_up_logging(); "
        "sys.exit(run(lambda: print('out') or event('started') or 7))"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 7
    assert "Traceback" not in done.stderr


def test_output_is_utf_8_in_every_locale() -> None:
    code = (
        "from orderlib.entry_point import run; from services.program import *; set_up_logging(); "
        "run(lambda: print('\\u0437\\xe7', '\\ud800') or event('started', topic='\\u0437') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        check=False,
    )
    assert done.stdout.decode() == "\u0437\xe7 \\ud800\n"
    assert '"topic":"\u0437"' in done.stderr.decode()


#: Writes lines in batches that are larger than what a pipe takes at once.
WRITES_BATCHES = """
import sys
from orderlib.entry_point import set_up_streams
set_up_streams()
for _ in range(300):
    sys.stderr.write((sys.argv[1] * 500 + "\\n") * 30)
    sys.stderr.flush()
"""


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_lines_of_several_processes_stay_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    if kind == "file":
        reading = os.open(path, os.O_RDONLY | os.O_CREAT)
        writing = os.open(path, os.O_WRONLY | os.O_APPEND)
    else:
        reading, writing = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITES_BATCHES, letter], cwd=ROOT, stderr=writing) for letter in "ab"
    ]
    os.close(writing)
    if kind == "file":
        assert [process.wait(60) for process in processes] == [0, 0]
    with open(reading, "rb") as log:  # noqa: PTH123 - a file descriptor
        lines = log.read().split(b"\n")
    assert [process.wait(60) for process in processes] == [0, 0]
    assert Counter(lines) == {b"a" * 500: 9_000, b"b" * 500: 9_000, b"": 1}
