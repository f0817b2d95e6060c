"""Counts and durations of requests, in memory that all worker processes share."""

from __future__ import annotations

import heapq
import mmap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from http import HTTPMethod, HTTPStatus

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

#: Values of the label ``route``: for a request that no route answers, because its path has none or access is refused;
#: and for one that the server refuses, because it is no valid HTTP or too large.
UNMATCHED, UNREADABLE = "unmatched", "unreadable"
#: Value of the label ``method`` for an unregistered method.
OTHER_METHOD = "other"

_METHODS = (OTHER_METHOD, *(str(method) for method in HTTPMethod))
_STATUSES = tuple(int(status) for status in HTTPStatus)
_SERVER_ERROR = _STATUSES.index(HTTPStatus.INTERNAL_SERVER_ERROR)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5)
#: The buckets, the bucket without an upper bound, and the sum in nanoseconds.
_TIME_CELLS = len(_BUCKETS) + 2

#: Workers that can run at the same time: 99, and the 99 that a reload replaces, rounded up.
_SLOTS = 200


class ApiMetrics(Collector):
    """The counts and durations of requests, as a collector of Prometheus.

    Create it before the fork. All workers share one anonymous memory mapping, and each counts in its own slot. This
    needs no lock and no file, which a full disk would make unwritable, and a SIGKILL leaves nothing behind. A slot
    keeps its counts when its worker ends, and the next worker continues in it, so counters never decrease.
    """

    def __init__(self, routes: Sequence[str]) -> None:
        self._routes = (UNMATCHED, UNREADABLE, *routes)
        self._route_numbers = {route: number for number, route in enumerate(self._routes)}
        self._method_numbers = {method: number for number, method in enumerate(_METHODS)}
        self._status_numbers = {status: number for number, status in enumerate(_STATUSES)}
        #: What ``_find_places`` has found, by route, method and status.
        self._places: dict[tuple[str, str, int], tuple[int, int]] = {}
        self._times_at = len(self._routes) * len(_METHODS) * len(_STATUSES)
        self._width = self._times_at + len(self._routes) * _TIME_CELLS
        #: Cell 0 is the number of slots used so far. Only the master process writes it.
        self._cells = memoryview(mmap.mmap(-1, 8 * (1 + _SLOTS * self._width))).cast("Q")
        self._cells[0] = 1
        self._free = list(range(_SLOTS))
        self.use_slot(0)

    def take_slot(self) -> int:
        """Reserve the lowest free slot. Call it in the master process, before the fork."""
        slot = heapq.heappop(self._free) if self._free else 0
        self._cells[0] = max(self._cells[0], slot + 1)
        return slot

    def free_slot(self, slot: int) -> None:
        """Free a slot for another worker. Call it in the master process, after the worker ended."""
        if slot not in self._free:
            heapq.heappush(self._free, slot)

    def use_slot(self, slot: int) -> None:
        """Count in this slot from now on. Call it in the worker process, after the fork."""
        self._mine = self._slot(slot)

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        cell, times = self._places.get((route, method, status)) or self._find_places(route, method, status)
        cells = self._mine
        cells[cell] += 1
        cells[times + bisect_left(_BUCKETS, seconds)] += 1
        cells[times + _TIME_CELLS - 1] += int(seconds * 1e9)

    def _find_places(self, route: str, method: str, status: int) -> tuple[int, int]:
        """Return the cell of a count, and the first cell of the durations."""
        number = self._route_numbers.get(route, 0)
        of_method = number * len(_METHODS) + self._method_numbers.get(method, 0)
        cell = of_method * len(_STATUSES) + self._status_numbers.get(status, _SERVER_ERROR)
        places = self._places[route, method, status] = cell, self._times_at + number * _TIME_CELLS
        return places

    @property
    def registry(self) -> CollectorRegistry:
        """Return a registry with only these metrics."""
        registry = CollectorRegistry()
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all slots."""
        cells = [sum(column) for column in zip(*map(self._slot, range(self._cells[0])), strict=True)]
        requests = CounterMetricFamily(
            "orders_http_requests", "Requests, including probes.", labels=["route", "method", "status"]
        )
        labels = ((route, method, str(code)) for route in self._routes for method in _METHODS for code in _STATUSES)
        for names, number in zip(labels, cells, strict=False):
            if number:
                requests.add_metric(names, number)
        yield requests
        times = HistogramMetricFamily("orders_http_request_seconds", "Duration of a request.", labels=["route"])
        for number, route in enumerate(self._routes):
            at = self._times_at + number * _TIME_CELLS
            *counts, nanoseconds = cells[at : at + _TIME_CELLS]
            if any(counts):
                bounds = [*map(floatToGoString, _BUCKETS), "+Inf"]
                totals = [sum(counts[: last + 1]) for last in range(len(counts))]
                times.add_metric([route], list(zip(bounds, totals, strict=True)), nanoseconds / 1e9)
        yield times

    def _slot(self, number: int) -> memoryview:
        at = 1 + number * self._width
        return self._cells[at : at + self._width]
