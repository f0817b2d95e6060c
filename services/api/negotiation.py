"""Content negotiation: JSON or a page, and the versions that a client has."""

from __future__ import annotations

import functools
from collections.abc import Collection

import falcon
from falcon.asgi import Request

from services.api.parameters import bad_parameter

#: The supported types. The first one wins if the client has no preference.
_SUPPORTED_TYPES = (falcon.MEDIA_JSON, falcon.MEDIA_HTML)

#: A longer ``Accept`` matches no type and a longer ``If-None-Match`` is ignored: real headers are shorter, and parsing
#: takes CPU time.
_MAX_HEADER_LENGTH = 2_000


def wants_page(req: Request) -> bool:
    """Return whether to answer with a page. Raise HTTPNotAcceptable if the client accepts neither JSON nor a page.

    ``format=json`` asks for JSON; any other value raises InvalidQuery.
    """
    requested = req.params.get("format")
    if requested is not None:
        if requested != "json":
            raise bad_parameter("format", "json", "another text")
        return False
    preferred = _preferred(req)
    if preferred is None:
        raise falcon.HTTPNotAcceptable(description="Supported types: application/json, text/html.")
    return preferred == falcon.MEDIA_HTML


def prefers_page(req: Request) -> bool:
    """Return whether to show an error as a page. Ignore an invalid ``format`` or ``Accept``: it may be the error."""
    return req.params.get("format") != "json" and _preferred(req) == falcon.MEDIA_HTML


def _preferred(req: Request) -> str | None:
    """Return the supported type that the client prefers, or None."""
    accept = req.accept
    return None if len(accept) > _MAX_HEADER_LENGTH else _best_match(accept)


@functools.lru_cache(maxsize=100)  # clients send few different headers
def _best_match(accept: str) -> str | None:
    """Return the supported type that ``Accept`` prefers, or None. Types ignore case (RFC 9110, 8.3.1)."""
    accept = accept.lower()
    try:
        return falcon.mediatypes.best_match(_SUPPORTED_TYPES, accept) or None
    except ValueError:
        readable = ",".join(filter(_is_readable, accept.split(",")))
        return falcon.mediatypes.best_match(_SUPPORTED_TYPES, readable) or None if readable else None


def _is_readable(media_range: str) -> bool:
    """Return whether a part of ``Accept`` is a media range. Other parts are ignored (RFC 9110, 5.6.1)."""
    try:
        falcon.mediatypes.quality(falcon.MEDIA_JSON, media_range)
    except ValueError:
        return False
    return True


def known_etags(req: Request) -> Collection[str]:
    """Return the versions in ``If-None-Match``. Compare them weakly (RFC 9110, 13.1.2)."""
    header = req.get_header("If-None-Match")
    if header is None or len(header) > _MAX_HEADER_LENGTH:
        return ()
    if header.strip() == "*":
        return ("*",)
    # Falcon removes the quotes: a quoted star is the name of a version, and none has it.
    return [etag for etag in req.if_none_match or () if etag != "*"]
