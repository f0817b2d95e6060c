"""The running server against its OpenAPI document."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs

import orderlib
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.support.api_process import serving, settings_for
from tests.support.databases import Database

SAMPLE = orderlib.decode_order(SAMPLE_JSON)


def test_the_server_does_what_its_openapi_document_says(module_database: Database, tmp_path: Path) -> None:
    """Schemathesis generates valid and invalid requests from the document and checks the answers against it."""
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save_many(attrs.evolve(SAMPLE, order_uid=f"n-{n}") for n in range(25))
    environ = settings_for(module_database.reader_url, ORDERS_API_TOKENS="schemathesis:token")
    # No record of these examples is ever handled, so each would wait as long as it may.
    (tmp_path / "schemathesis.toml").write_text('[parameters]\n"query.wait" = 0.01\n')
    with serving(environ) as api:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"http://{api.address}/openapi.json"),
                *("--header", "Authorization: Bearer token", "--no-color"),
                *("--max-examples", "3", "--seed", str(int.from_bytes(os.urandom(2)))),
                *("--request-timeout", "10"),
                # A cursor is opaque, so the document cannot say which texts are valid.
                *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            ],
            cwd=tmp_path,
            env={**environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert len(api.events("request")) > 100
        assert api.events("request_failed") == []
