"""Helpers for tests of programs that use orderlib.

They are repositories in memory whose calls can fail, factories of valid orders, a sample order, and invalid orders by
kind of fault. Strategies for valid orders are in ``orderlib.testing.strategies``. Only they need hypothesis
(``orderlib[testing]``).
"""

from importlib import resources

from orderlib.testing.factories import make_delivery, make_item, make_order, make_orders, make_payment
from orderlib.testing.failures import Failure
from orderlib.testing.faulty import BadRecord, FaultKind, break_order
from orderlib.testing.memory import AsyncMemoryOrderRepository, MemoryOrderRepository

#: The sample order as a shop sends it: JSON, not in canonical form.
SAMPLE: bytes = resources.files("orderlib.testing").joinpath("sample.json").read_bytes()

__all__ = [
    "SAMPLE",
    "AsyncMemoryOrderRepository",
    "BadRecord",
    "Failure",
    "FaultKind",
    "MemoryOrderRepository",
    "break_order",
    "make_delivery",
    "make_item",
    "make_order",
    "make_orders",
    "make_payment",
]
