"""A time limit for an answer that needs several reads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec, TypeVar

from orderlib.errors import DatabaseUnavailable

#: Each read has its own time limit. This one is for all reads of an answer together.
ANSWER_TIMEOUT_S = 4.5

P = ParamSpec("P")
T = TypeVar("T")


def with_deadline(
    respond: Callable[P, Coroutine[object, object, T]], limit_s: float | None = None
) -> Callable[P, Coroutine[object, object, T]]:
    """Make a coroutine function raise DatabaseUnavailable if it takes longer than its limit, or than 4.5 s."""

    @functools.wraps(respond)
    async def bounded(*args: P.args, **kwargs: P.kwargs) -> T:
        timeout_s = ANSWER_TIMEOUT_S if limit_s is None else limit_s
        try:
            async with asyncio.timeout(timeout_s):
                return await respond(*args, **kwargs)
        except TimeoutError as exc:
            raise DatabaseUnavailable(f"PostgreSQL did not answer within {timeout_s:.2g} s") from exc

    return bounded
