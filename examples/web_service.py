"""An asyncio web service that stores an order and its gift message in one transaction.

Start it where this file is, with the writer's URL in ORDERS_DATABASE_URL:

    python -m gunicorn --worker-class asgi 'web_service:create_app()'
"""

from __future__ import annotations

import os

import falcon
import falcon.asgi
import msgspec
import psycopg
from falcon.asgi import Request, Response

import orderlib

MAX_BODY_BYTES = 1024 * 1024
#: How often to try again after a conflict with another writer.
ATTEMPTS = 5
#: No call waits longer: neither to connect, nor for a statement.
CONNECT_TIMEOUT_S = 5
SETTINGS = "-c statement_timeout=5s"


class Gift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request."""

    #: The JSON of the order. orderlib decodes it, by its own rules.
    order: msgspec.Raw
    gift_message: str


class GiftsResource:
    """``/gifts``."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def on_post(self, req: Request, resp: Response) -> None:
        """Store a gift: the order and its message, or neither."""
        if (req.content_length or 0) > MAX_BODY_BYTES:
            raise falcon.HTTPContentTooLarge
        try:
            gift = msgspec.json.decode(await req.stream.read(MAX_BODY_BYTES), type=Gift)
            order = orderlib.decode_order(bytes(gift.order))
        except (msgspec.DecodeError, UnicodeDecodeError, orderlib.RejectedError) as exc:
            # The text names paths and what was expected, never a value.
            raise falcon.HTTPUnprocessableEntity(description=str(exc)) from exc
        resp.media = {"outcome": await self._store(order, gift.gift_message)}
        resp.status = falcon.HTTP_CREATED

    async def on_get_gift(self, _req: Request, resp: Response, order_uid: str) -> None:
        """Return an order with its message, both from one snapshot."""
        try:
            async with await self._connect() as connection:
                await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
                order = await orderlib.using_async(connection).get(order_uid)
                found = await connection.execute("SELECT message FROM gift_messages WHERE order_uid = %s", [order_uid])
                row = await found.fetchone()
        except orderlib.OrderNotFound as exc:
            raise falcon.HTTPNotFound from exc
        except (orderlib.DatabaseUnavailable, psycopg.OperationalError) as exc:
            raise falcon.HTTPServiceUnavailable(retry_after=1) from exc
        message = row[0] if row else None
        resp.content_type = falcon.MEDIA_JSON
        resp.data = msgspec.json.encode({"order": msgspec.Raw(orderlib.encode_order(order)), "gift_message": message})

    async def _store(self, order: orderlib.Order, message: str) -> orderlib.Outcome:
        for _ in range(ATTEMPTS):
            try:
                return await self._store_once(order, message)
            except (orderlib.TransactionConflict, psycopg.errors.TransactionRollback):
                continue
            except (orderlib.DatabaseUnavailable, psycopg.OperationalError) as exc:
                # The outcome may be unknown. The client may send the gift again: both writes are idempotent.
                raise falcon.HTTPServiceUnavailable(retry_after=1) from exc
            except (psycopg.DataError, psycopg.IntegrityError) as exc:
                raise falcon.HTTPUnprocessableEntity(description="gift_message: expected 1 to 500 characters") from exc
        raise falcon.HTTPServiceUnavailable(retry_after=1)

    async def _store_once(self, order: orderlib.Order, message: str) -> orderlib.Outcome:
        # The end of this block commits. An exception rolls back.
        async with await self._connect() as connection:
            outcome = await orderlib.using_async(connection).save(order)
            await connection.execute(
                "INSERT INTO gift_messages (order_uid, message) VALUES (%s, %s)"
                " ON CONFLICT (order_uid) DO UPDATE SET message = excluded.message",
                [order.order_uid, message],
            )
        return outcome

    async def _connect(self) -> psycopg.AsyncConnection:
        """Connect. A busy service takes connections from a pool instead, such as psycopg_pool's."""
        return await psycopg.AsyncConnection.connect(
            self._url, connect_timeout=CONNECT_TIMEOUT_S, options=SETTINGS, application_name="gifts"
        )


def create_app() -> falcon.asgi.App[Request, Response]:
    """Return the application."""
    app = falcon.asgi.App()
    gifts = GiftsResource(os.environ["ORDERS_DATABASE_URL"])
    app.add_route("/gifts", gifts)
    app.add_route("/gifts/{order_uid}", gifts, suffix="gift")
    return app
