"""What the sandbox prepares once for each user, and keeps between runs."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def user_cache() -> Path:
    """Return the cache folder, which stays between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orderlib"


def create_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`. If it does not exist, let `fill` write its files into a new folder and rename that.

    So the folder is complete or absent. Only one process at a time runs `fill`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    return folder
