"""Who may read orders."""

from __future__ import annotations

import base64
import re

import falcon
from falcon.asgi import Request, Response

from services.settings import LOCAL_HOSTS, ApiSettings

#: Paths without personal data: health and the description of the API.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/openapi.json"})

_LOCALHOST = re.compile(rf"(?:{'|'.join(map(re.escape, LOCAL_HOSTS))})(?::\d{{1,5}})?", re.IGNORECASE)
#: Basic comes first because Chromium reads only the first challenge of a line.
_CHALLENGES = ['Basic realm="orders", charset="UTF-8"', 'Bearer realm="orders"']


class AuthMiddleware:
    """Middleware: require a token except on the open paths or, without tokens, serve requests to localhost only.

    A client sends its token as Bearer, or as the password of Basic with any user name: a browser asks for that.
    """

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    async def process_request(self, req: Request, _resp: Response) -> None:
        """Raise HTTPUnauthorized or, for a Host header that does not name localhost, a 421."""
        if req.path in OPEN_PATHS:
            return
        if not self._settings.tokens:
            # Any website can point a name of its own at 127.0.0.1 (DNS rebinding), but a browser sends that name here.
            if not _LOCALHOST.fullmatch(req.get_header("Host", default="")):
                raise falcon.HTTPError(
                    falcon.HTTP_MISDIRECTED_REQUEST,
                    description="Without tokens, the service answers only requests to localhost.",
                )
            return
        token = _token_in(req.auth or "")
        name = self._settings.name_of(token) if token else None
        if name is None:
            raise falcon.HTTPUnauthorized(description="A token is required.", challenges=_CHALLENGES)
        req.context.log_fields["token_name"] = name


def _token_in(authorization: str) -> str | None:
    scheme, _, credentials = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            token = credentials
        case "basic":
            try:
                token = base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return None
        case _:
            return None
    # No token has white space. A copied one may have some around it.
    return token.strip()
