"""Typed orders: from Kafka into PostgreSQL and back, exactly as sent.

>>> import orderlib
>>> with orderlib.connect(url) as repository:  # doctest: +SKIP
...     repository.save(orderlib.decode_order(data))
...     order = repository.get("b563feb7b2b84b6test")
"""

from orderlib.codecs import (
    content_sha256,
    decode_order,
    encode_order,
    order_from_plain,
    order_to_plain,
    register_order_hooks,
)
from orderlib.errors import (
    BrokenSetup,
    BrokerUnreachable,
    Collision,
    Fault,
    FenceLost,
    InvalidOrder,
    MalformedJson,
    OrderError,
    OrderNotFound,
    Refused,
    RefusedByDatabase,
    RejectNotFound,
    StoreUnreachable,
    TooLarge,
    TryAgain,
)
from orderlib.models import Delivery, Item, Order, Payment
from orderlib.postgres import AsyncPostgresOrderReader, PostgresOrderRepository
from orderlib.repository import (
    AsyncOrderReader,
    Cursor,
    OrderRepository,
    Outcome,
    Page,
    Status,
    StoredOrder,
)

__version__ = "0.1.0"

connect = PostgresOrderRepository.connect

__all__ = [
    "AsyncOrderReader",
    "AsyncPostgresOrderReader",
    "BrokenSetup",
    "BrokerUnreachable",
    "Collision",
    "Cursor",
    "Delivery",
    "Fault",
    "FenceLost",
    "InvalidOrder",
    "Item",
    "MalformedJson",
    "Order",
    "OrderError",
    "OrderNotFound",
    "OrderRepository",
    "Outcome",
    "Page",
    "Payment",
    "PostgresOrderRepository",
    "Refused",
    "RefusedByDatabase",
    "RejectNotFound",
    "Status",
    "StoreUnreachable",
    "StoredOrder",
    "TooLarge",
    "TryAgain",
    "connect",
    "content_sha256",
    "decode_order",
    "encode_order",
    "order_from_plain",
    "order_to_plain",
    "register_order_hooks",
]
