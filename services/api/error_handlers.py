"""Every error as problem+json (RFC 9457), or as a page for a browser; the same status either way."""

from __future__ import annotations

import logging
import traceback
from http import HTTPStatus
from typing import Any

import falcon
import msgspec
from falcon.asgi import App, Request, Response

from orderlib.errors import ConfigurationError, InvalidQuery, OrderNotFound, TransientError
from services.api.negotiation import prefers_page
from services.api.pages import Pages
from services.program import event

#: Seconds after which a client may ask again; an outage shorter than that is hardly noticed.
RETRY_AFTER_S = 2

PROBLEM_JSON = "application/problem+json"


def problem(status: HTTPStatus, detail: str, request_id: str) -> bytes:
    """Return the problem+json document of an error."""
    return msgspec.json.encode(
        {
            "type": "about:blank",
            "title": status.phrase,
            "status": status,
            "detail": detail,
            "request_id": request_id,
        }
    )


class ErrorHandlers:
    """Turns whatever was raised into an answer."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def attach(self, app: App[Request, Response]) -> None:
        """Answer for every error of this application."""
        app.add_error_handler(Exception, self._answer_unforeseen)
        app.add_error_handler(falcon.HTTPError, self._answer)
        app.add_error_handler(OrderNotFound, self._answer_not_found)
        app.add_error_handler(InvalidQuery, self._answer_invalid)
        app.add_error_handler(TransientError, self._answer_unavailable)
        app.add_error_handler(ConfigurationError, self._answer_not_set_up)

    async def _answer(self, req: Request, resp: Response, error: falcon.HTTPError, _params: dict[str, Any]) -> None:
        status = HTTPStatus(falcon.http_status_to_code(error.status))
        detail = error.description or status.description
        resp.status = status
        resp.set_headers(error.headers or {})
        resp.set_header("Cache-Control", "no-store")
        if prefers_page(req):
            self._pages.show(
                resp, "error.html", status=status, detail=detail, request_id=req.context.request_id, query=""
            )
            return
        resp.content_type = PROBLEM_JSON
        resp.data = problem(status, detail, req.context.request_id)

    async def _answer_not_found(
        self, req: Request, resp: Response, _error: OrderNotFound, params: dict[str, Any]
    ) -> None:
        await self._answer(req, resp, falcon.HTTPNotFound(description="No order has this order_uid."), params)

    async def _answer_invalid(self, req: Request, resp: Response, error: InvalidQuery, params: dict[str, Any]) -> None:
        await self._answer(req, resp, falcon.HTTPBadRequest(description=f"{error}."), params)

    async def _answer_unavailable(
        self, req: Request, resp: Response, error: TransientError, params: dict[str, Any]
    ) -> None:
        req.context.reason = str(error)
        unavailable = falcon.HTTPServiceUnavailable(
            description="The database does not answer. Please try again.", retry_after=RETRY_AFTER_S
        )
        await self._answer(req, resp, unavailable, params)

    async def _answer_not_set_up(
        self, req: Request, resp: Response, error: ConfigurationError, params: dict[str, Any]
    ) -> None:
        req.context.reason = str(error)
        unavailable = falcon.HTTPServiceUnavailable(
            description="The service is not set up; its log says what is missing.", retry_after=RETRY_AFTER_S
        )
        await self._answer(req, resp, unavailable, params)

    async def _answer_unforeseen(self, req: Request, resp: Response, error: Exception, params: dict[str, Any]) -> None:
        # Where and of which kind; what it says may quote an order.
        event(
            "request_failed",
            logging.ERROR,
            error=type(error).__name__,
            traceback="".join(traceback.format_tb(error.__traceback__)),
            request_id=req.context.request_id,
        )
        await self._answer(req, resp, falcon.HTTPInternalServerError(), params)
