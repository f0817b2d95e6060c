"""Wait for a condition by polling, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T | None], within_s: float = 30.0, *, describe: Callable[[], object] | None = None
) -> T:
    """Poll a condition, and return its value as soon as that is true.

    Fails after ``within_s``. The failure has what ``describe`` returns then.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {describe() if describe else condition}"
        time.sleep(0.02)
    return value
