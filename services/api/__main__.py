"""`python -m services.api`: orders over HTTP, for programs and for people."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import sys

import attrs

from orderlib.errors import ConfigurationError, DatabaseUnavailable
from orderlib.postgres.connections import connect
from orderlib.postgres.migrate import READER_RIGHTS, check_rights, check_schema
from services.api.app import METRICS_ROUTE, ROUTES
from services.api.asgi import build
from services.api.metrics import Metrics
from services.program import EXIT_DONE, event, run, set_up_logging
from services.settings import ApiSettings

DESCRIPTION = """\
Gives stored orders back over HTTP: as JSON to programs, as pages to people.

ORDERS_READER_URL       PostgreSQL as the reader
ORDERS_API_BIND         where to listen (127.0.0.1:8080); port 0 takes a free one
ORDERS_API_TOKENS       name:token, several with commas: who may read
ORDERS_API_AUTH=off     instead of tokens: everybody who asks localhost may read
ORDERS_API_KEEPALIVE_S  seconds to keep an idle connection (75); longer than a load balancer keeps its own
ORDERS_METRICS_BIND     where /metrics is, and /livez and /readyz once more (127.0.0.1:9102)
WEB_CONCURRENCY         worker processes (1)

Exit status: 0 stopped, 1 failed, 2 wrong settings or set-up.
"""


def main() -> int:
    """Serve until told to stop."""
    argparse.ArgumentParser(
        prog="python -m services.api", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    settings = ApiSettings.from_mapping(os.environ)
    if not re.fullmatch("[1-9][0-9]?", os.environ.get("WEB_CONCURRENCY", "1")):
        raise ConfigurationError("WEB_CONCURRENCY must be an integer from 1 to 99")
    # gunicorn reads that variable when it is imported.
    from services.api.server import Server, bound_address, listen  # noqa: PLC0415

    set_up_logging()
    _look_at_database(settings.reader_url)
    listener = listen("ORDERS_API_BIND", settings.bind)
    metrics_listener = listen("ORDERS_METRICS_BIND", settings.metrics_bind)
    settings = attrs.evolve(settings, bind=bound_address(listener), metrics_bind=bound_address(metrics_listener))
    if settings.bind.port == settings.metrics_bind.port:
        raise ConfigurationError("ORDERS_API_BIND and ORDERS_METRICS_BIND need ports of their own")
    if not settings.tokens:
        event("no_authentication", logging.WARNING, served="localhost only")
    metrics = Metrics([*ROUTES, METRICS_ROUTE])
    event("listening", address=str(settings.bind), metrics=str(settings.metrics_bind))
    Server(
        listener,
        metrics_listener,
        load=functools.partial(build, settings, metrics),
        metrics=metrics,
        keepalive_s=settings.keepalive_s,
    ).run()
    return EXIT_DONE


def _look_at_database(url: str) -> None:
    """Raise ConfigurationError for what only an operator can mend; say so if there is nothing to look at yet."""
    try:
        with connect(url, application_name="orderlib-api") as connection:
            check_schema(connection)
            check_rights(connection, READER_RIGHTS)
    except DatabaseUnavailable as exc:
        event("waiting_for_server", logging.WARNING, server="PostgreSQL", reason=str(exc))


if __name__ == "__main__":
    sys.exit(run(main))
