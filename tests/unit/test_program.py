"""What a program of ours writes to stderr, and the status it leaves."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from orderlib import ConfigurationError, DatabaseUnavailable, OrderlibError, RefusedByDatabase
from services.program import event, log, run, set_up_logging

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    """A stream that a person reads."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, our_level = root.handlers[:], root.level, log.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    log.setLevel(our_level)


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
    event("odd", where=Path("a"), partitions={2}, error=DatabaseUnavailable("away"))
    logged = json.loads(stream.getvalue())
    assert (logged["where"], logged["partitions"], logged["error"]) == ("a", [2], "away")


def test_a_person_at_a_terminal_reads_another_format() -> None:
    stream = Terminal()
    set_up_logging(stream)
    event("batch_stored", level=logging.WARNING, partition=3)
    event("idle")
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" warning batch_stored partition=3")
    assert second.endswith(" info    idle")


def test_warnings_of_libraries_are_lines_of_ours_and_their_chatter_is_not() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    logging.getLogger("psycopg.pool").info("chatter")
    logging.getLogger("psycopg.pool").warning("error connecting in %r", "pool")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["error connecting in 'pool'"]


def test_a_traceback_stays_within_its_line() -> None:
    stream = io.StringIO()
    set_up_logging(stream)
    try:
        raise DatabaseUnavailable("away")
    except DatabaseUnavailable:
        log.exception("stopped")
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["traceback"].endswith("DatabaseUnavailable: away")


def test_setting_up_again_does_not_write_lines_twice() -> None:
    stream = io.StringIO()
    set_up_logging(io.StringIO())
    set_up_logging(stream, logging.WARNING)
    event("unheard")
    event("heard", logging.ERROR)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["heard"]


# Exit statuses


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_program_leaves_the_status_it_returns(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: status) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigurationError("ORDERS_TOPIC is not set"), 2, "error: ORDERS_TOPIC is not set\n"),
        (DatabaseUnavailable("PostgreSQL: away"), 1, "error: PostgreSQL: away\n"),
        (
            RefusedByDatabase("23514", "b563"),
            1,
            "error: refused_by_database: $: expected order b563 that PostgreSQL takes, found SQLSTATE 23514\n",
        ),
        (OrderlibError("anything else of ours"), 1, "error: anything else of ours\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
    ],
)
def test_an_error_of_ours_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_any_other_error_is_a_bug_and_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line_and_a_status(unbuffered: str) -> None:
    program = "import sys; from services.program import run; sys.exit(run(lambda: print('an order') or 0))"
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


def test_a_reader_that_has_had_enough_is_no_traceback() -> None:
    program = (
        "import sys\n"
        "from services.program import run\n"
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


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_failure(closed: str) -> None:
    code = (
        "import sys; from services.program import *; set_up_logging(); "
        "sys.exit(run(lambda: print('out') or event('told') or 7))"
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
        "from services.program import *; set_up_logging(); "
        "run(lambda: print('\\u0437\\xe7', '\\ud800') or event('told', topic='\\u0437') or 0)"
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
