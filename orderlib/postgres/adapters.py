"""psycopg's own adapters between values of Python and of PostgreSQL.

Those that a program registers for all its connections must not change what orderlib sends and reads.
"""

from __future__ import annotations

import json

from psycopg import dbapi20, postgres
from psycopg.adapt import AdaptersMap
from psycopg.types import TypesRegistry, array
from psycopg.types.json import set_json_loads


def _own_adapters() -> AdaptersMap:
    """Return the adapters that psycopg has after its import, in the sequence in which it registers them."""
    adapters = AdaptersMap(types=TypesRegistry())
    postgres.register_default_types(adapters.types)
    postgres.register_default_adapters(adapters)
    dbapi20.register_dbapi20_adapters(adapters)
    array.register_all_arrays(adapters)
    # A global function for JSON is in the classes of the adapters.
    set_json_loads(json.loads, adapters)
    return adapters


ADAPTERS = _own_adapters()
