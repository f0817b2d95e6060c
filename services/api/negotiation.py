"""What the client wants: JSON or a page, and which version it has already."""

from __future__ import annotations

from collections.abc import Collection

import falcon
from falcon.asgi import Request

from services.api.parameters import bad_parameter

#: In the order in which we prefer them where the client does not care.
_OFFERS = (falcon.MEDIA_JSON, falcon.MEDIA_HTML)

#: A longer ``Accept`` or ``If-None-Match`` is disregarded: clients send a fraction of it, and parsing takes CPU time.
_MAX_HEADER_LENGTH = 2_000


def prefers_page(req: Request) -> bool:
    """Whether a page suits this client better than JSON, as it does a browser that did not ask for ``format=json``."""
    if req.params.get("format") == "json":
        return False
    return _preferred(req) == falcon.MEDIA_HTML


def require_acceptable(req: Request) -> None:
    """Raise HTTPNotAcceptable for a client that takes neither, InvalidOrder for another ``format`` than ``json``."""
    if req.params.get("format", "json") != "json":
        raise bad_parameter("format", "json", "another text")
    if req.params.get("format") != "json" and _preferred(req) is None:
        raise falcon.HTTPNotAcceptable(description="Supported types: application/json, text/html.")


def _preferred(req: Request) -> str | None:
    """Return the best of what we offer, or None; names of media types have no case (RFC 9110, 8.3.1)."""
    accept = req.accept.lower()
    if len(accept) > _MAX_HEADER_LENGTH:
        return None
    try:
        return falcon.mediatypes.best_match(_OFFERS, accept) or None
    except ValueError:
        readable = ",".join(filter(_is_readable, accept.split(",")))
        return falcon.mediatypes.best_match(_OFFERS, readable) or None if readable else None


def _is_readable(media_range: str) -> bool:
    """Tell whether a part of ``Accept`` is a media range; others are disregarded (RFC 9110, 5.6.1)."""
    try:
        falcon.mediatypes.quality(falcon.MEDIA_JSON, media_range)
    except ValueError:
        return False
    return True


def known_etags(req: Request) -> Collection[str]:
    """Return the versions in ``If-None-Match``; to be compared weakly (RFC 9110, 13.1.2)."""
    header = req.get_header("If-None-Match")
    if header is None or len(header) > _MAX_HEADER_LENGTH:
        return ()
    return req.if_none_match or ()
