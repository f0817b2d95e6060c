"""Helpers for tests of programs that use orderlib.

They are a repository in memory, a sample order, and invalid orders by kind of fault. Strategies for valid orders are in
``orderlib.testing.strategies``. Only they need hypothesis (``orderlib[testing]``).
"""

from importlib import resources

from orderlib.testing.faulty import BadRecord, FaultKind, break_order
from orderlib.testing.memory import MemoryOrderRepository

#: The sample order as a shop sends it: JSON, not in canonical form.
SAMPLE: bytes = resources.files("orderlib.testing").joinpath("sample.json").read_bytes()

__all__ = ["SAMPLE", "BadRecord", "FaultKind", "MemoryOrderRepository", "break_order"]
