"""The id, the log line and the metrics of each request, without personal data."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from http import HTTPMethod, HTTPStatus

from falcon.asgi import Request, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from services.api.error_handlers import PROBLEM_JSON, problem
from services.api.event_loop import call_when_idle
from services.api.metrics import OTHER_METHOD, UNMATCHED, ApiMetrics
from services.program import Event, event, log_events

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_METHODS = frozenset(HTTPMethod)

#: Requests are logged and counted when the worker is idle, but at once when as many as this were answered.
MAX_ANSWERED = 64

#: The route, method and status of a request that was answered, its duration in seconds, its id, and more fields to log.
Answered = tuple[str, str, int, float, str, dict[str, object]]


def make_request_id() -> str:
    """Return a new request id: 128 random bits. It is no secret."""
    return f"{random.getrandbits(128):032x}"


class RequestMetricsMiddleware:
    """The outermost middleware: log and count every request, also one that another middleware refuses."""

    def __init__(self, metrics: ApiMetrics, make_id: Callable[[], str]) -> None:
        self.metrics = metrics
        self._make_id = make_id
        self._answered: list[Answered] = []

    async def process_request(self, req: Request, resp: Response) -> None:
        """Start the clock, and set the request id: the client's if it is valid, else a new one.

        ``log_fields`` are added to the log line.
        """
        req.context.started = time.perf_counter()
        req.context.log_fields = {}
        # Not get_header: for most requests, which have none, it would raise and catch an error.
        given = dict(req.scope["headers"]).get(b"x-request-id", b"")
        req.context.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else self._make_id()
        resp.set_header("X-Request-Id", req.context.request_id)

    async def process_response(self, req: Request, resp: Response, _resource: object, _succeeded: bool) -> None:
        """Log and count the request later, when the worker is idle, together with others."""
        self._answered.append(self.answered(req, resp.status_code))
        if len(self._answered) == 1:
            call_when_idle(self.log_and_count_answered)
        elif len(self._answered) >= MAX_ANSWERED:
            self.log_and_count_answered()

    def log_and_count_answered(self) -> None:
        """Log and count the requests that were answered so far."""
        answered, self._answered = self._answered, []
        self.log_and_count(answered)

    def answered(self, req: Request, status: int) -> Answered:
        """Return what is logged and counted. Not the request itself, so that the next one can use its memory."""
        route = req.uri_template or UNMATCHED
        method = req.method if req.method in _METHODS else OTHER_METHOD
        seconds = time.perf_counter() - req.context.started
        return route, method, status, seconds, req.context.request_id, req.context.log_fields

    def log_and_count(self, answered: Iterable[Answered]) -> None:
        """Log and count requests."""
        events: list[Event] = []
        for route, method, status, seconds, request_id, more in answered:
            self.metrics.count(route, method, status, seconds)
            level = logging.WARNING if "reason" in more else logging.INFO
            ms = round(seconds * 1000, 2)
            fields = {"route": route, "method": method, "status": status, "ms": ms, "request_id": request_id, **more}
            events.append((level, "request", fields))
        log_events(events)

    def refuse(self, status: HTTPStatus, route: str) -> tuple[dict[str, str], bytes]:
        """Log and count a request that no resource answers. Return the headers and body to send."""
        request_id = self._make_id()
        self.metrics.count(route, OTHER_METHOD, status, 0.0)
        event("request", logging.WARNING, route=route, method=OTHER_METHOD, status=status, request_id=request_id)
        body = problem(status, status.description or status.phrase, request_id)
        return {
            "Cache-Control": "no-store",
            "Content-Type": PROBLEM_JSON,
            "Content-Length": str(len(body)),
            "X-Request-Id": request_id,
        }, body


class MetricsResource:
    """``/metrics``, served on a separate address."""

    def __init__(self, request_metrics: RequestMetricsMiddleware) -> None:
        self._request_metrics = request_metrics
        self._registry = request_metrics.metrics.registry

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Return all metrics in the text format of Prometheus, with every request that this worker has answered."""
        self._request_metrics.log_and_count_answered()
        resp.content_type = CONTENT_TYPE_LATEST
        resp.data = generate_latest(self._registry)
