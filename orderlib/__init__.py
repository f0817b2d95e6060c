"""Typed orders: from Kafka into PostgreSQL and back, with every known field equal.

>>> import orderlib
>>> with orderlib.connect(url) as repository:  # doctest: +SKIP
...     repository.save(orderlib.decode_order(data))
...     order = repository.get("b563feb7b2b84b6test")
"""

from orderlib.codecs import (
    content_sha256,
    decode_order,
    encode_order,
    json_schema,
    order_from_plain,
    order_to_plain,
    register_order_hooks,
)
from orderlib.errors import (
    BreakerTripped,
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    Fault,
    FenceLost,
    InvalidOrder,
    InvalidQuery,
    MalformedJson,
    OrderlibError,
    OrderNotFound,
    RefusedByDatabase,
    RejectedError,
    RejectNotFound,
    TooLarge,
    TopicRecreated,
    TransactionConflict,
    TransientError,
    UnreadableRecord,
)
from orderlib.models import Delivery, Item, Order, Payment
from orderlib.postgres import AsyncPostgresOrderRepository, PostgresOrderRepository
from orderlib.postgres.connect import connect, connect_async
from orderlib.postgres.migrate import migrate
from orderlib.postgres.roles import BootstrapResult, bootstrap
from orderlib.postgres.using import using, using_async
from orderlib.repository import (
    AsyncOrderRepository,
    Cursor,
    Direction,
    Filters,
    ListOptions,
    Match,
    OrderRepository,
    OrderSummary,
    Outcome,
    Page,
    PositionState,
    RecordPosition,
    RecordState,
    Stats,
    StoredOrder,
)
from orderlib.search import SearchField

__version__ = "0.1.0"

__all__ = [
    "AsyncOrderRepository",
    "AsyncPostgresOrderRepository",
    "BootstrapResult",
    "BreakerTripped",
    "BrokerUnavailable",
    "ConfigurationError",
    "Cursor",
    "DatabaseUnavailable",
    "Delivery",
    "Direction",
    "Fault",
    "FenceLost",
    "Filters",
    "InvalidOrder",
    "InvalidQuery",
    "Item",
    "ListOptions",
    "MalformedJson",
    "Match",
    "Order",
    "OrderNotFound",
    "OrderRepository",
    "OrderSummary",
    "OrderlibError",
    "Outcome",
    "Page",
    "Payment",
    "PositionState",
    "PostgresOrderRepository",
    "RecordPosition",
    "RecordState",
    "RefusedByDatabase",
    "RejectNotFound",
    "RejectedError",
    "SearchField",
    "Stats",
    "StoredOrder",
    "TooLarge",
    "TopicRecreated",
    "TransactionConflict",
    "TransientError",
    "UnreadableRecord",
    "bootstrap",
    "connect",
    "connect_async",
    "content_sha256",
    "decode_order",
    "encode_order",
    "json_schema",
    "migrate",
    "order_from_plain",
    "order_to_plain",
    "register_order_hooks",
    "using",
    "using_async",
]
