"""For tests of programs that use orderlib: a repository in memory, the well-known sample, bad orders by kind of fault.

Generators of good orders are in ``orderlib.testing.strategies``; they alone need hypothesis (``orderlib[testing]``).
"""

from importlib import resources

from orderlib.testing.faulty import BadRecord, FaultKind, break_order
from orderlib.testing.memory import MemoryOrderRepository

#: A well-known order as its shop sends it: JSON, not in canonical form.
SAMPLE: bytes = resources.files("orderlib.testing").joinpath("sample.json").read_bytes()

__all__ = ["SAMPLE", "BadRecord", "FaultKind", "MemoryOrderRepository", "break_order"]
