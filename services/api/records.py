"""What happened to a Kafka record: a client that sent one can wait until its order can be read."""

from __future__ import annotations

import asyncio
import re

import attrs
import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.errors import DatabaseUnavailable
from orderlib.repository import (
    MAX_OFFSET,
    MAX_PARTITION,
    AsyncOrderRepository,
    Polling,
    PositionState,
)
from services.api.deadline import ANSWER_TIMEOUT_S, with_deadline
from services.api.parameters import bad_parameter, parse_integer, single_parameter

#: The longest time that a client may ask to wait.
MAX_WAIT_S = 5
#: The last read may end this long after the wait.
_LAST_READ_S = 2.0
#: Connections that reads of positions use at the same time. The others of the pool stay free for orders.
_MAX_CONNECTIONS = 4
#: With many waiting clients, each asks less often, so that all together ask at most 500 times a second.
_POLL_GAP_S = 0.002

#: A number that is not negative, as JSON, Python or JavaScript write it. ``float`` also accepts ``inf`` and ``1_0``.
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

#: The names that Kafka accepts for a topic, and ``.`` and ``..``, which no client can send in a path.
TOPIC_PATTERN = "^[A-Za-z0-9._-]{1,249}$"


class RecordResource:
    """``/records/{topic}/{partition}/{offset}``."""

    PARAMETERS = frozenset({"wait"})

    def __init__(self, repository: AsyncOrderRepository) -> None:
        self._repository = repository
        self._connections = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._waiting = 0

    async def on_get(self, req: Request, resp: Response, topic: str, partition: str, offset: str) -> None:
        """Return the state of a record, as soon as it is handled or rejected, or at the end of the wait."""
        if not re.fullmatch(TOPIC_PATTERN, topic):
            raise bad_parameter("topic", "1 to 249 of the characters A-Z a-z 0-9 . _ -", "another text")
        position = (
            topic,
            parse_integer("partition", partition, 0, MAX_PARTITION),
            parse_integer("offset", offset, 0, MAX_OFFSET),
        )
        wait_s = _wait_s(req)
        resp.set_header("Cache-Control", "no-store")
        state = await self._state_after(position, wait_s)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = msgspec.json.encode(
            {
                "state": state.state,
                "code": state.code,
                "faults": [attrs.asdict(fault) for fault in state.faults],
                "total_faults": state.total_faults,
            }
        )

    on_head = on_get

    async def _state_after(self, position: tuple[str, int, int], wait_s: float) -> PositionState:
        """Return the state once the record is handled or rejected, or after this time.

        A read that fails meanwhile is repeated.
        """
        polling = Polling(wait_s)
        limit_s = max(ANSWER_TIMEOUT_S, wait_s + _LAST_READ_S)
        self._waiting += 1
        try:
            return await with_deadline(self._poll, limit_s)(position, polling)
        finally:
            self._waiting -= 1

    async def _poll(self, position: tuple[str, int, int], polling: Polling) -> PositionState:
        while True:
            try:
                async with self._connections:
                    state = await self._repository.position_state(*position)
                if polling.ends_with(state):
                    return state
            except DatabaseUnavailable:
                if not polling.remaining_s:
                    raise
            await asyncio.sleep(polling.next_pause_s(self._waiting * _POLL_GAP_S))


def _wait_s(req: Request) -> float:
    text = single_parameter(req, "wait")
    if text is None:
        return 0.0
    if not _NUMBER.fullmatch(text) or float(text) > MAX_WAIT_S:
        raise bad_parameter("wait", f"seconds from 0 to {MAX_WAIT_S}", "another value")
    return float(text)
