"""Print results for people and programs, and ask for confirmation."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import msgspec

from orderlib.contract import fits_postgres

ResultRow = Mapping[str, object]

#: A progress line is written at most this often.
_PROGRESS_EVERY_S = 0.2

#: Text is escaped in pieces of this length, because Python makes an object of each character meanwhile.
_PIECE = 4096


def printable(text: str) -> str:
    """Escape, as JSON does, every character that a terminal may interpret instead of showing it.

    These are control characters (also C1), format and bidirectional controls, separators and unassigned characters.
    Inside a JSON text the result is still the same JSON. Line feeds stay.
    """
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    return "".join(piece if piece.isprintable() else _escape_piece(piece) for piece in pieces)


def _escape_piece(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else _escape_character(char) for char in text)


def _escape_character(char: str) -> str:
    return json.dumps(char, ensure_ascii=True)[1:-1] if char != "\x7f" else "\\u007f"


def print_bytes(data: bytes) -> None:
    """Print a text in UTF-8: unchanged for a program, and escaped for a terminal, which would obey its characters."""
    sys.stdout.buffer.write(printable(data.decode()).encode() if sys.stdout.isatty() else data)


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 order``, ``2 orders``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def utf8_text(text: str) -> str:
    """Return a command-line argument that is UTF-8. Python has lone surrogates for other bytes."""
    if not fits_postgres(text):
        raise argparse.ArgumentTypeError("must be UTF-8")
    return text


def integer_up_to(maximum: int) -> Callable[[str], int]:
    """Return a parser of command-line arguments: integers from 1 to ``maximum``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > len(str(maximum)) or not 1 <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"must be an integer from 1 to {maximum}")
        return int(text)

    return parse


#: Parses an argument that has no limit of its own.
positive_integer = integer_up_to(999_999_999)


def rfc3339_time(text: str) -> dt.datetime:
    """Parse an argument that is a time with an offset."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a time such as 2026-01-31T12:00:00Z") from None
    if moment.utcoffset() is None:
        raise argparse.ArgumentTypeError("must have an offset, such as Z")
    return moment


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, which prints the result as JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def print_json(result: object) -> None:
    """Print a result as indented JSON."""
    print(printable(msgspec.json.format(msgspec.json.encode(result), indent=2).decode()))


def print_table(rows: Sequence[ResultRow], *, as_json: bool) -> None:
    """Print rows with the same keys as a JSON array or as a table with a header."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_result(sentence: str, result: ResultRow, *, as_json: bool) -> None:
    """Print what was done, as a sentence or as a JSON object."""
    print(printable(msgspec.json.encode(result).decode() if as_json else sentence))


def utc_text(time: dt.datetime) -> str:
    """Return a time in UTC, for people."""
    return time.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case dt.datetime():
            return utc_text(value)
        case int():
            return f"{value:,}"
        case _:
            return printable(str(value))


def add_yes_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--yes``, which skips the confirmation."""
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def confirm(question: str, *, yes: bool) -> bool:
    """Return whether the operator confirms: on a terminal by an answer, elsewhere only by ``--yes``."""
    if yes:
        return True
    # Python has None for a closed standard input.
    if sys.stdin is None or not sys.stdin.isatty():
        print(f"{question}: not confirmed; add --yes to confirm without a terminal", file=sys.stderr)
        return False
    print(f"{question}? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = ""
    try:
        answer = sys.stdin.readline()
    finally:
        if not answer.endswith("\n"):
            # Ctrl-C or Ctrl-D: what follows must not continue the line of the question.
            print(file=sys.stderr)
    return answer.strip().lower() in {"y", "yes"}


class ProgressLine:
    """A count of what is done, on stderr if that is a terminal.

    At the end of the block, also after an error or Ctrl-C, it shows the last count and ends its line.
    """

    def __init__(self, what: str, *, shown: bool = True) -> None:
        self._what = what
        self._is_shown = shown and sys.stderr.isatty()
        self._count: int | None = None
        self._next_write_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._count is not None:
            self._write(self._count)
            print(file=sys.stderr)

    def at(self, count: int) -> None:
        """Show the count, unless another one was shown a moment ago."""
        if not self._is_shown:
            return
        self._count = count
        if (now_s := time.monotonic()) >= self._next_write_s:
            self._next_write_s = now_s + _PROGRESS_EVERY_S
            self._write(count)

    def _write(self, count: int) -> None:
        print(f"\r{count:,} {self._what}", end="", file=sys.stderr, flush=True)
