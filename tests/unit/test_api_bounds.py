"""Time limits of the API that are too long to wait for in a test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import attrs
import pytest

from orderlib import DatabaseUnavailable
from services.api import deadline
from services.api.event_loop import EventLoop
from services.api.server import SEND_TIMEOUT_S, _Protocol


def test_an_answer_of_several_reads_has_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "ANSWER_TIMEOUT_S", 0.01)

    @deadline.with_deadline
    async def respond() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DatabaseUnavailable, match="did not answer within"):
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


class CountedProtocol(asyncio.Protocol):
    """The number of open connections."""

    number = 0

    def connection_made(self, _transport: asyncio.BaseTransport) -> None:
        CountedProtocol.number += 1

    def connection_lost(self, _exc: Exception | None) -> None:
        CountedProtocol.number -= 1


def test_a_worker_leaves_connections_that_are_opened_at_the_same_time_to_other_workers() -> None:
    async def accept_for_three_turns(listener: socket.socket) -> None:
        # This worker and another one have the same listener.
        of_another_worker = listener.dup()
        server = await asyncio.get_running_loop().create_server(CountedProtocol, sock=listener)
        with ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            for _ in range(3):
                await asyncio.sleep(0)
            left = 0
            with suppress(BlockingIOError):
                while True:
                    stack.enter_context(of_another_worker.accept()[0])
                    left += 1
            assert left >= 16 - 4
            while CountedProtocol.number < 16 - left:
                await asyncio.sleep(0)
            server.close()
        while CountedProtocol.number:
            await asyncio.sleep(0)
        of_another_worker.close()

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(accept_for_three_turns(socket.create_server(("127.0.0.1", 0))))
