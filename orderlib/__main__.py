"""``python -m orderlib``: create roles and tables from an installed package."""

import logging
import os
import sys

from orderlib.commands import main
from orderlib.entry_point import run, set_up_streams

if __name__ == "__main__":
    set_up_streams()
    # After Ctrl-C psycopg warns of its rollback, and prints its objects.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)
    sys.exit(run(lambda: main(sys.argv[1:], os.environ)))
