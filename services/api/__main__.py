"""`python -m services.api`: serve orders over HTTP, to programs and to people."""

from __future__ import annotations

if __name__ == "__main__":
    from services import end_at_early_sigterm

    end_at_early_sigterm()

import argparse
import functools
import logging
import os
import re
import sys

import attrs

from orderlib.entry_point import EXIT_DONE, EXIT_STATUSES, run
from orderlib.errors import ConfigurationError, DatabaseUnavailable
from orderlib.postgres.connections import open_connection
from orderlib.postgres.grants import check_privileges, expect_role, is_superuser
from orderlib.postgres.privileges import READER
from orderlib.postgres.schema import check_schema
from services.api.app import METRICS_ROUTE, ROUTES
from services.api.asgi import APPLICATION_NAME, build
from services.api.metrics import ApiMetrics
from services.program import event, set_up_program
from services.settings import API_METRICS_BIND, DEFAULTS, ApiSettings

_BIND, _KEEPALIVE_S = DEFAULTS["ORDERS_API_BIND"], DEFAULTS["ORDERS_API_KEEPALIVE_S"]

DESCRIPTION = f"""\
Serve stored orders over HTTP: as JSON to programs, as pages to people.

ORDERS_READER_URL       URL of PostgreSQL, with the role orders_reader
ORDERS_API_BIND         address to listen on ({_BIND}); port 0 selects a free port
ORDERS_API_TOKENS       tokens of clients: name:token, several separated by commas
ORDERS_API_AUTH=off     no tokens: anyone on this machine may read, and only localhost is served
ORDERS_API_KEEPALIVE_S  seconds until an idle connection is closed ({_KEEPALIVE_S}); set it above the load balancer's
ORDERS_API_STATUS_WORDS what the status codes of items mean: code:word, several separated by commas
ORDERS_METRICS_BIND     address of /metrics, and of /livez and /readyz for probes ({API_METRICS_BIND})
WEB_CONCURRENCY         number of worker processes (1)

{EXIT_STATUSES}
"""


def main() -> int:
    """Serve until a signal stops the process."""
    argparse.ArgumentParser(
        prog="python -m services.api", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    settings = ApiSettings.from_mapping(os.environ)
    if not os.environ.get("WEB_CONCURRENCY"):
        os.environ["WEB_CONCURRENCY"] = "1"
    if not re.fullmatch("[1-9][0-9]?", os.environ["WEB_CONCURRENCY"]):
        raise ConfigurationError("WEB_CONCURRENCY must be an integer from 1 to 99")
    from services.api.server import Server, bound_address, listen  # noqa: PLC0415 - gunicorn reads the variable on import

    _check_database(settings.reader_url)
    listener = listen("ORDERS_API_BIND", settings.bind)
    metrics_listener = listen("ORDERS_METRICS_BIND", settings.metrics_bind)
    settings = attrs.evolve(settings, bind=bound_address(listener), metrics_bind=bound_address(metrics_listener))
    if settings.bind.port == settings.metrics_bind.port:
        raise ConfigurationError("ORDERS_API_BIND and ORDERS_METRICS_BIND must have different ports")
    if not settings.tokens:
        event("no_authentication", logging.WARNING, served="localhost only")
    metrics = ApiMetrics([*ROUTES, METRICS_ROUTE])
    event("listening", address=str(settings.bind), metrics=str(settings.metrics_bind))
    Server(
        listener,
        metrics_listener,
        load=functools.partial(build, settings, metrics),
        metrics=metrics,
        keepalive_s=settings.keepalive_s,
    ).run()
    return EXIT_DONE


def _check_database(url: str) -> None:
    """Raise ConfigurationError for what an operator must correct. Log an outage and return: the service waits."""
    try:
        with open_connection(url, application_name=APPLICATION_NAME) as connection:
            with expect_role(connection, READER):
                check_schema(connection)
            check_privileges(connection, READER)
            if is_superuser(connection):
                event("connected_as_superuser", logging.WARNING, variable="ORDERS_READER_URL")
    except DatabaseUnavailable as exc:
        event("waiting_for_server", logging.WARNING, server="PostgreSQL", reason=str(exc))


if __name__ == "__main__":
    set_up_program(os.environ)
    sys.exit(run(main))
