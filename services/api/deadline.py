"""A bound on a whole answer, however many reads it takes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from orderlib.errors import DatabaseUnavailable

#: Every read has bounds of its own; an answer of several reads ends by then.
ANSWERED_WITHIN_S = 4.5

P = ParamSpec("P")


def with_deadline(responder: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, Coroutine[Any, Any, None]]:
    """Raise DatabaseUnavailable for an answer that is not there in 4.5 s."""

    @functools.wraps(responder)
    async def respond(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            async with asyncio.timeout(ANSWERED_WITHIN_S):
                await responder(*args, **kwargs)
        except TimeoutError as exc:
            raise DatabaseUnavailable(f"PostgreSQL: no answer within {ANSWERED_WITHIN_S} s") from exc

    return respond
