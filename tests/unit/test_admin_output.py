"""What the operator's command prints and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import unicodedata

import pytest

from orderlib.errors import RejectNotFound
from services.admin.__main__ import main, make_parser
from services.admin.output import ProgressLine, confirm, count_of, printable
from tests.support import ROOT

EVERY_CHARACTER = "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))


def test_whatever_a_terminal_may_obey_is_escaped_and_json_stays_the_same_json() -> None:
    text = json.dumps(EVERY_CHARACTER, ensure_ascii=False)
    shown = printable(text)
    assert {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} == set()
    assert json.loads(shown) == EVERY_CHARACTER


def test_text_that_shows_as_it_is_stays() -> None:
    assert printable("Zoë, 東京\n") == "Zoë, 東京\n"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rejects"), (1, "1 reject"), (2, "2 rejects"), (1234, "1,234 rejects")]
)
def test_a_number_agrees_with_its_noun(number: int, text: str) -> None:
    assert count_of(number, "reject") == text


def test_a_missing_reject_is_no_missing_order() -> None:
    assert str(RejectNotFound("orders/0/9")) == "no reject 'orders/0/9'"


@pytest.mark.parametrize(
    "command", ["get", "forget", "forget --customer", "export --customer", "backfill --after", "offsets set-group"]
)
def test_an_argument_that_is_not_utf_8_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), os.fsdecode(b"\xff")], {})
    assert ended.value.code == 2
    assert "must be UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("uid", ["", "no such uid !", ".", "..", "a\n", "x" * 129, "é"])
def test_forget_refuses_what_no_order_may_have_as_its_order_uid(uid: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing removes a digest again, and an unset variable is an empty argument."""
    with pytest.raises(SystemExit, match="2"):
        main(["forget", "--yes", "--", uid], {})
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "argument UID: must be an order_uid: 1 to 128 of the characters A-Z a-z 0-9 . _ : - but not . or .. alone"
    )


def test_forget_refuses_an_empty_customer_id(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["forget", "--customer", "", "--yes"], {})
    assert "argument --customer: must not be empty\n" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "maximum"), [("--partitions", 100_000), ("--replication-factor", 10_000)])
def test_topics_refuses_numbers_beyond_the_limits_of_librdkafka(
    option: str, maximum: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, maximum + 1, 10**30):
        with pytest.raises(SystemExit, match="2"):
            main(["topics", option, str(number)], {})
        assert f"argument {option}: must be an integer from 1 to {maximum}\n" in capsys.readouterr().err
    accepted = make_parser().parse_args(["topics", option, str(maximum)])
    assert maximum in {accepted.partitions, accepted.replication_factor}


def test_without_standard_input_nothing_is_confirmed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert not confirm("erase order 7 permanently", yes=False)
    assert "add --yes" in capsys.readouterr().err
    assert confirm("erase order 7 permanently", yes=True)


@pytest.mark.parametrize("arguments", ["", "orders/0/1 --older-than 1d", "orders/0", "orders/0/x"])
def test_purge_needs_one_position_or_an_age(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rejects", "purge", *arguments.split(), "--yes"], {})


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def set_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal. Not as a fixture: pytest sets its own standard error after them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_progress_is_written_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now_s = set_terminal(monkeypatch), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with ProgressLine("records") as progress:
        for count in range(1, 1001):
            progress.at(count)
        assert terminal.getvalue() == "\r1 records"
        now_s += 0.2
        progress.at(1001)
        assert terminal.getvalue() == "\r1 records\r1,001 records"
        progress.at(1002)
    assert terminal.getvalue() == "\r1 records\r1,001 records\r1,002 records\n"


def test_an_error_does_not_continue_the_line_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = set_terminal(monkeypatch)
    with contextlib.suppress(KeyboardInterrupt), ProgressLine("records") as progress:
        progress.at(9)
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\r9 records\n")


def test_progress_that_shows_nothing_leaves_no_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = set_terminal(monkeypatch)
    with ProgressLine("records"):
        pass
    with ProgressLine("records", shown=False) as progress:
        progress.at(1)
    assert terminal.getvalue() == ""


def test_what_follows_an_unanswered_question_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    for readline in (lambda: "", interrupt):
        terminal, keyboard = set_terminal(monkeypatch), Terminal()
        monkeypatch.setattr(keyboard, "readline", readline)
        monkeypatch.setattr(sys, "stdin", keyboard)
        with contextlib.suppress(KeyboardInterrupt):
            assert not confirm("erase order 7 permanently", yes=False)
        assert terminal.getvalue() == "erase order 7 permanently? [y/N] \n"


@pytest.mark.parametrize("program", ["services.admin", "orderlib"])
def test_a_warning_of_psycopg_is_not_printed(program: str) -> None:
    """After Ctrl-C in the middle of a pipeline it warns of its rollback, with the repr of its objects."""
    code = f"""
import logging, runpy, sys
from orderlib import commands
commands._migrate = lambda *_: logging.getLogger("psycopg").warning("error ignored in rollback") or 0
sys.argv = ["program", "migrate"]
runpy.run_module("{program}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
