"""Time limits of the API that are too long to wait for in a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import attrs
import pytest

from orderlib import DatabaseUnavailable
from services.api import deadline
from services.api.server import SEND_TIMEOUT_S, _Protocol


def test_an_answer_of_several_reads_has_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "ANSWER_TIMEOUT_S", 0.01)

    @deadline.with_deadline
    async def respond() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DatabaseUnavailable, match="no answer within"):
        asyncio.run(respond())


@attrs.define
class Transport:
    """A connection with unsent bytes, and the timer of its event loop."""

    unsent: int
    aborted: bool = False
    check: Callable[[], None] | None = None

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True

    def call_later(self, seconds: float, callback: Callable[[int], None], before: int) -> None:
        assert seconds == SEND_TIMEOUT_S
        self.check = lambda: callback(before)

    def time_passes(self) -> None:
        assert self.check is not None
        self.check()


def test_a_client_that_reads_slowly_gets_the_complete_answer_and_one_that_reads_nothing_is_closed() -> None:
    protocol = object.__new__(_Protocol)
    transport = Transport(unsent=1_000)
    protocol.transport, protocol.worker = transport, SimpleNamespace(loop=transport)
    protocol._check_sending()
    for unsent in (900, 500, 1):
        transport.unsent = unsent
        transport.time_passes()
        assert not transport.aborted
    transport.time_passes()
    assert transport.aborted
