"""Turn every exception into problem+json (RFC 9457) or, for a browser, into a page with the same status."""

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

#: Seconds after which a client may repeat its request: clients then hardly notice a short outage.
RETRY_AFTER_S = 2

#: What a page says about a status: its title, and what to do next.
_WORDS = {
    HTTPStatus.BAD_REQUEST: (
        "Invalid request",
        "Correct it, search above, or begin with all orders.",
    ),
    HTTPStatus.UNAUTHORIZED: (
        "You need a token",
        "Load the page again. Enter any user name, and your token as the password.",
    ),
    HTTPStatus.NOT_FOUND: (
        "Not found",
        "Check the address, or search above, also by phone or e-mail. A new order may need seconds to be stored.",
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "Orders cannot be read at the moment",
        "No order is lost. Try again in a few seconds. If it takes minutes, ask for help.",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: (
        "Something went wrong in this service",
        "Try again. If it happens again, give your operator the request id below: the log has the cause.",
    ),
}
_OTHER_WORDS = ("The request failed", "Search above, or begin with all orders.")

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


def add_error_handlers(app: App[Request, Response], pages: Pages) -> None:
    """Let the application answer every exception with a problem document or an error page."""

    async def answer(req: Request, resp: Response, exc: Exception, _params: dict[str, Any]) -> None:
        error = _http_error(req, exc)
        status = HTTPStatus(falcon.http_status_to_code(error.status))
        detail = error.description or status.description
        request_id = req.context.request_id
        resp.status = status
        resp.set_headers(error.headers or {})
        resp.set_header("Cache-Control", "no-store")
        if prefers_page(req):
            title, next_step = _WORDS.get(status, _OTHER_WORDS)
            # The text of a search can be corrected. If there are several, that is the error.
            text = req.params.get("q")
            pages.show(
                resp,
                "error.html",
                title=title,
                detail=detail,
                next_step=next_step,
                status=status,
                request_id=request_id,
                query=text if isinstance(text, str) else "",
            )
            return
        resp.content_type = PROBLEM_JSON
        resp.data = problem(status, detail, request_id)

    app.add_error_handler(Exception, answer)
    # Without this line, Falcon's own handler for HTTPError is the more specific one.
    app.add_error_handler(falcon.HTTPError, answer)


def _http_error(req: Request, exc: Exception) -> falcon.HTTPError:
    """Return the HTTP error to answer with. Log the cause of an error that is not the client's."""
    match exc:
        case falcon.HTTPError():
            return exc
        case OrderNotFound():
            return falcon.HTTPNotFound(description="No order has this order_uid.")
        case InvalidQuery():
            return falcon.HTTPBadRequest(description=f"{exc}.")
        case TransientError():
            req.context.log_fields["reason"] = str(exc)
            return falcon.HTTPServiceUnavailable(
                description="The database is unavailable. Please try again.", retry_after=RETRY_AFTER_S
            )
        case ConfigurationError():
            req.context.log_fields["reason"] = str(exc)
            return falcon.HTTPServiceUnavailable(
                description="The service is not configured correctly. Its log names the cause.",
                retry_after=RETRY_AFTER_S,
            )
        case _:
            log_failure(exc, request_id=req.context.request_id)
            return falcon.HTTPInternalServerError()


def log_failure(exc: Exception, **fields: str) -> None:
    """Log the type of an exception and where it was raised. Its message may quote an order, so leave that out."""
    event(
        "request_failed",
        logging.ERROR,
        error=type(exc).__name__,
        traceback="".join(traceback.format_tb(exc.__traceback__)),
        **fields,
    )
