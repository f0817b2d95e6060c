"""Helpers of the tests."""

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).parents[2]

#: The sandbox's settings as JSON, for a run of tests inside a test.
SHARED_SANDBOX = "TESTS_SANDBOX"

#: The folder of a PostgreSQL with Citus, to run the tests there.
CITUS = "TESTS_CITUS"
