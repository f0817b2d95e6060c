"""Limit the rate of sending."""

from __future__ import annotations

#: After a stall, catch up on at most this much lost time.
CATCH_UP_S = 1.0


class RateLimiter:
    """Spread records evenly over time.

    Inexact waits do not add up, because late records are sent faster. After a stall it catches up on at most
    ``CATCH_UP_S``, so that no burst follows.
    """

    def __init__(self, per_s: float | None, now_s: float) -> None:
        """Start now. With ``None`` there is no limit."""
        self._gap_s = 1 / per_s if per_s else 0.0
        self._due_s = now_s

    def early_s(self, now_s: float) -> float:
        """Return how long to wait before the next record; 0 or less if it is due."""
        return self._due_s - now_s

    def record_sent(self, now_s: float) -> None:
        """Count a record as sent now."""
        self._due_s = max(self._due_s, now_s - CATCH_UP_S) + self._gap_s
