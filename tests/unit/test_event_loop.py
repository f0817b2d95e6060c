"""Work for when a worker is idle: the API logs and counts its requests there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine

from services.api.event_loop import EventLoop


def run(main: Coroutine[object, object, None], loop: EventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(asyncio.wait_for(main, 10))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_callbacks_wait_for_what_is_scheduled_and_for_what_has_arrived() -> None:
    loop, called = EventLoop(), []
    near, far = socket.socketpair()

    def read_one() -> None:
        called.append(near.recv(1).decode())
        if called[-1] == "c":
            loop.remove_reader(near)

    async def main() -> None:
        loop.call_when_idle(lambda: called.append("idle"))
        loop.call_when_idle(lambda: called.append("idle, second"))
        loop.call_soon(lambda: loop.call_soon(lambda: called.append("scheduled")))
        loop.add_reader(near, read_one)
        far.send(b"abc")
        await until(lambda: len(called) == 6)

    with near, far:
        run(main(), loop)
    assert sorted(called[:4]) == ["a", "b", "c", "scheduled"]
    assert called[4:] == ["idle", "idle, second"]


def test_a_callback_that_waits_already_is_called_once_and_can_wait_again() -> None:
    loop = EventLoop()
    called: list[int] = []
    done = asyncio.Event()

    def callback() -> None:
        called.append(len(called))

    async def main() -> None:
        for number in (1, 2):
            loop.call_when_idle(callback)
            loop.call_when_idle(callback)
            loop.call_when_idle(done.set)
            await done.wait()
            done.clear()
            assert len(called) == number

    run(main(), loop)


def test_a_loop_that_ends_before_it_is_idle_calls_back() -> None:
    loop, called = EventLoop(), []

    async def main() -> None:
        loop.call_when_idle(lambda: called.append("idle"))

    run(main(), loop)
    assert called == ["idle"]


def test_a_callback_that_fails_stops_neither_the_loop_nor_other_callbacks() -> None:
    loop, called, failures = EventLoop(), [], []

    def fail() -> None:
        raise ValueError("failed")

    async def main() -> None:
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        loop.call_when_idle(fail)
        loop.call_when_idle(lambda: called.append("idle"))
        await until(lambda: called == ["idle"])

    run(main(), loop)
    assert [str(failure) for failure in failures] == ["failed"]
