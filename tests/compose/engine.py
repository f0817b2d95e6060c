"""Call docker and docker compose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]

#: The label of a local image that replaces a public one.
STAND_IN = "orderlib.stand-in"


def docker(*arguments: str) -> str:
    """Run ``docker …`` and return its output. Raise AssertionError with its stderr if it fails."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stderr}"
    return done.stdout.strip()


def works(*command: str) -> bool:
    """Whether a command exists and ends with 0."""
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def base_images() -> list[str]:
    """Return the public images that the system is built on, without those for monitoring."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    found = {service["image"] for service in services if "profiles" not in service}
    found |= set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    return sorted(found - {"orderlib"})


def is_stand_in(image: str) -> bool | None:
    """Whether the image is a stand-in; ``None`` if there is no image of this name."""
    if not works("docker", "image", "inspect", image):
        return None
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image))
    return STAND_IN in (labels or {})


def find_missing() -> str | None:
    """Return in one line why the tests cannot run, or ``None`` if they can. Pull missing images first."""
    if not works("docker", "version"):
        return "these tests need docker, and a daemon that answers `docker version`"
    if not works("docker", "compose", "version"):
        return "these tests need docker's plugin compose: `docker compose version` does not work"
    for image in base_images():
        if is_stand_in(image) is None and not works("docker", "pull", "--quiet", image):
            return f"{image} cannot be pulled; see tests/compose/README.md for stand-ins"
    return None
