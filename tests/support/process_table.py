"""Find the processes and open ports that a sandbox has left."""

import socket
from contextlib import suppress
from pathlib import Path

import psutil


def listens(port: int) -> bool:
    """Return whether a server accepts connections on a port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes with the folder in their arguments, or as their working directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            arguments = " ".join(process.cmdline())
            if str(folder) in arguments or process.cwd().startswith(str(folder)):
                found.append(arguments)
    return found
