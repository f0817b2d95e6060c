"""The thread of the store, seen from the main thread, which also handles signals."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from orderlib.ingestion.consumer_core import Breaker
from services.consumer.health import ConsumerMetrics
from services.consumer.runner import StoreWorker


@pytest.fixture
def worker() -> Iterator[StoreWorker]:
    unused = cast(Any, None)
    worker = StoreWorker(unused, unused, Breaker(0.9), ConsumerMetrics())
    yield worker
    worker.close(timeout_s=5)


@contextlib.contextmanager
def alarms(first_s: float, second_s: float) -> Iterator[None]:
    """Send two signals. The handler of the first returns late, and that of the second fails."""
    handlers = iter((lambda: time.sleep(0.1), lambda: pytest.fail("the wait has no limit")))
    before = signal.signal(signal.SIGALRM, lambda *_: next(handlers)())
    signal.setitimer(signal.ITIMER_REAL, first_s, second_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_wait_for_a_result_ends_although_a_signal_is_handled_until_after_its_limit(worker: StoreWorker) -> None:
    with alarms(0.02, 1):
        assert worker.take_result(0.05) is None
