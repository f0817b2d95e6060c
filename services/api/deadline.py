"""A time limit for an answer that needs several reads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

from orderlib.errors import DatabaseUnavailable

#: Each read has its own time limit. This one is for all reads of an answer together.
ANSWER_TIMEOUT_S = 4.5

P = ParamSpec("P")
#: A method of a resource that answers a request, such as ``on_get``.
Responder = Callable[P, Coroutine[object, object, None]]


def with_deadline(responder: Responder[P]) -> Responder[P]:
    """Make a responder raise DatabaseUnavailable if its answer takes longer than 4.5 s."""

    @functools.wraps(responder)
    async def respond(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await responder(*args, **kwargs)
        except TimeoutError as exc:
            raise DatabaseUnavailable(f"PostgreSQL: no answer within {ANSWER_TIMEOUT_S} s") from exc

    return respond
