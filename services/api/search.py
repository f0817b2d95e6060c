"""Search: the orders that an order_uid, a phone number or another text identifies, for programs and for people."""

from __future__ import annotations

from urllib.parse import quote, urlencode

import attrs
import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.repository import MAX_PAGE_SIZE, AsyncOrderRepository, Match
from orderlib.search import SearchField, SearchText
from services.api.deadline import with_deadline
from services.api.negotiation import wants_page
from services.api.pages import Pages
from services.api.parameters import MAX_SEARCH_CHARS, bad_parameter, limit_parameter, single_parameter

#: What a page calls the fields.
_REASONS = {
    SearchField.ORDER_UID: "order",
    SearchField.ORDER_UID_PREFIX: "start of order",
    SearchField.TRACK_NUMBER: "track number",
    SearchField.CUSTOMER_ID: "customer",
    SearchField.PHONE: "phone",
    SearchField.EMAIL: "e-mail",
    SearchField.RID: "item",
}
#: The fields that ``/orders`` filters by: a link leads to all orders that match.
_LISTED = (SearchField.CUSTOMER_ID, SearchField.PHONE, SearchField.EMAIL, SearchField.TRACK_NUMBER)


class SearchResource:
    """``/search``. The text may be personal data: it is in no log, and no cache stores an answer."""

    PARAMETERS = frozenset({"q", "limit", "format"})

    def __init__(self, repository: AsyncOrderRepository, pages: Pages) -> None:
        self._repository = repository
        self._pages = pages

    @with_deadline
    async def on_get(self, req: Request, resp: Response) -> None:
        """Return the matches. A browser is redirected to the order if there is one match."""
        is_page = wants_page(req)
        limit = limit_parameter(req)
        text = single_parameter(req, "q") or ""
        if len(text) > MAX_SEARCH_CHARS:
            raise bad_parameter("q", f"at most {MAX_SEARCH_CHARS} characters", "more")
        resp.set_header("Cache-Control", "no-store")
        if not is_page:
            if not text.strip():
                raise bad_parameter("q", "a text", "none")
            found = await self._repository.find(text, limit=limit)
            resp.content_type = falcon.MEDIA_JSON
            resp.data = msgspec.json.encode({"matches": [_plain(match) for match in found]})
            return
        found = await self._repository.find(text, limit=min(limit + 1, MAX_PAGE_SIZE)) if text.strip() else ()
        if len(found) == 1:
            resp.set_header("Location", f"/orders/{quote(found[0].order.order_uid, safe=':')}")
            resp.status = falcon.HTTP_SEE_OTHER
            return
        self._pages.show(
            resp,
            "search.html",
            query=text,
            matches=found[:limit],
            orders=[match.order for match in found[:limit]],
            reasons={match.order.order_uid: ", ".join(_REASONS[field] for field in match.fields) for match in found},
            may_be_more=len(found) > limit or len(found) == MAX_PAGE_SIZE,
            lists=_lists(text, found),
        )

    on_head = on_get


def _plain(match: Match) -> dict[str, object]:
    return {**attrs.asdict(match.order), "fields": match.fields}


def _lists(text: str, found: tuple[Match, ...]) -> dict[str, str]:
    """Return the URL of the list of all orders, for each field that matches, by its name on the page."""
    search = SearchText.parse(text)
    if search is None:
        return {}
    values = {SearchField.PHONE: search.phone}
    matching = {field for match in found for field in match.fields}
    return {
        _REASONS[field]: f"/orders?{urlencode({str(field): values.get(field) or search.text})}"
        for field in _LISTED
        if field in matching
    }
