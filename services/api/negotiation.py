"""What the client wants: JSON or a page, a fresh copy or none."""

from __future__ import annotations

import falcon
from falcon.asgi import Request

#: In the order in which we prefer them where the client does not care.
_OFFERS = (falcon.MEDIA_JSON, falcon.MEDIA_HTML)


def prefers_page(req: Request) -> bool:
    """Whether a page suits this client better than JSON, as it does a browser that did not ask for ``format=json``."""
    if req.params.get("format") == "json":
        return False
    return _preferred(req) == falcon.MEDIA_HTML


def require_acceptable(req: Request) -> None:
    """Raise HTTPNotAcceptable for a client that takes neither."""
    if req.params.get("format") != "json" and _preferred(req) is None:
        raise falcon.HTTPNotAcceptable(description="There is JSON and there are pages, nothing else.")


def _preferred(req: Request) -> str | None:
    """The best of what we offer; the names of media types are compared whatever their case (RFC 9110, 8.3.1)."""
    return falcon.mediatypes.best_match(_OFFERS, req.accept.lower()) or None


def has_fresh_copy(req: Request, etag: str) -> bool:
    """Whether ``If-None-Match`` names this version, or any with ``*``; compared weakly, as RFC 9110 asks."""
    return any(known in ("*", etag) for known in req.if_none_match or ())
