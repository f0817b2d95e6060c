"""Bounds of the API that no real client should have to wait for in a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import attrs
import pytest

from orderlib import DatabaseUnavailable
from services.api import deadline
from services.api.server import SEND_TIMEOUT_S, _Protocol


def test_an_answer_of_many_reads_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "ANSWER_TIMEOUT_S", 0.01)

    @deadline.with_deadline
    async def respond() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DatabaseUnavailable, match="no answer within"):
        asyncio.run(respond())


@attrs.define
class Transport:
    """A connection with so much to be taken, and the timer of its loop."""

    waiting: int
    aborted: bool = False
    look: Callable[[], None] | None = None

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True

    def call_later(self, seconds: float, callback: Callable[[int], None], before: int) -> None:
        assert seconds == SEND_TIMEOUT_S
        self.look = lambda: callback(before)

    def time_passes(self) -> None:
        assert self.look is not None
        self.look()


def test_a_client_that_takes_its_answer_slowly_gets_it_whole_and_one_that_takes_nothing_is_closed() -> None:
    protocol = object.__new__(_Protocol)
    transport = Transport(waiting=1_000)
    protocol.transport, protocol.worker = transport, SimpleNamespace(loop=transport)
    protocol._check_sending()
    for waiting in (900, 500, 1):
        transport.waiting = waiting
        transport.time_passes()
        assert not transport.aborted
    transport.time_passes()
    assert transport.aborted
