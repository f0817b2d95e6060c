"""What is sent, and when: the lines of a file, and the pace."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterable, Iterator

from orderlib.codecs import decode_order
from orderlib.errors import ConfigurationError, RejectedError

_READ_BYTES = 1024 * 1024

#: The largest ``message.max.bytes`` that librdkafka takes.
MAX_LINE_BYTES = 1_000_000_000

#: How many lines that are not orders are named; the others are counted.
MAX_NAMED = 100

#: After a stall, catch up on at most this much lost time.
CATCH_UP_S = 1.0


def lines(file: int, idle_s: float) -> Iterator[bytes | None]:
    r"""Yield the lines of an open file unchanged, without their ``\n``; ``None`` if no data came for ``idle_s``.

    The last line may lack its ``\n``. Nothing else ends a line, and an empty line is a line. ``None`` comes also with
    each part of a long line, so that the caller can stop. Raises ConfigurationError for a line that no record can hold.
    """
    parts: list[bytes] = []
    length = 0
    while True:
        if not select.select([file], [], [], idle_s)[0]:
            yield None
            continue
        read = os.read(file, _READ_BYTES)
        if not read:
            break
        first, *others = read.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > MAX_LINE_BYTES:
            raise ConfigurationError(
                f"a line of the input is longer than {MAX_LINE_BYTES:,} bytes, the most of any record"
            )
        if others:
            yield b"".join(parts)
            *whole, rest = others
            yield from whole
            parts, length = [rest], len(rest)
        else:
            yield None
    if length:
        yield b"".join(parts)


class RateLimiter:
    """Spread records evenly over time.

    Late records are caught up, so that inexact waits add up to no drift; at most ``CATCH_UP_S``, so that no burst
    follows a stall.
    """

    def __init__(self, per_s: float | None, now_s: float) -> None:
        """``None``: no limit."""
        self._gap_s = 1 / per_s if per_s else 0.0
        self._due_s = now_s

    def early_s(self, now_s: float) -> float:
        """How long until the next turn; not above 0 if it is due."""
        return self._due_s - now_s

    def take_turn(self, now_s: float) -> None:
        """The next turn is taken now."""
        self._due_s = max(self._due_s, now_s - CATCH_UP_S) + self._gap_s


def named(values: Iterable[bytes | None], source: str) -> Iterator[bytes | None]:
    """Yield the lines of ``source`` unchanged, and name on stderr those that are not orders, the first 100 by number.

    Raises ConfigurationError if the first line is not an order: then the file does not hold one order a line.
    """
    number = refused = 0
    for value in values:
        if value is not None:
            number += 1
            try:
                decode_order(value)
            except RejectedError as refusal:
                if number == 1:
                    raise ConfigurationError(
                        f"{source}: line 1 is not an order ({refusal}); an order must be on one line (`jq -c .` puts "
                        "it there), and --any sends lines that are not orders"
                    ) from refusal
                refused += 1
                if refused <= MAX_NAMED:
                    print(f"warning: {source}: line {number:,} is not an order ({refusal})", file=sys.stderr)
        yield value
    if refused > MAX_NAMED:
        told = f"{refused:,} lines are not orders, {MAX_NAMED} of them named above"
        print(f"warning: {source}: {told}", file=sys.stderr)
