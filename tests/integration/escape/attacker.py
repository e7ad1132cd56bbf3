"""The guest process with somebody else's native code in it: a stand-in for vtl0_guest.server in vmm.launcher.SERVERS.

It serves VTL0 as ever, with its certificate, its descriptors and what confinement left it. On a socket in its own
folder, which is where it may make one, it takes the names of steps (tests/integration/escape/steps.py) and does them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from tests.integration.escape import lies, steps
from vtl0_guest import server
from vtlab.channels import ServerConfig


def address(state: Path, process: int) -> str:
    return str(state / f"shell-{process}")


def main(config: ServerConfig) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address(config.state, os.getpid()))
    listener.listen()
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    server.main(config)


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rwb") as stream:
        name, arguments = json.loads(stream.readline())
        step = getattr(steps, name, None) or getattr(lies, name)
        try:
            answer = {"value": step(*arguments)}
        except OSError as error:
            answer = {"errno": error.errno, "text": str(error)}
        stream.write(json.dumps(answer).encode() + b"\n")


def ask(state: Path, process: int, name: str, arguments: tuple[Any, ...]) -> Any:
    """Does a step in that process. Raises the OSError that it met."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(address(state, process))
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps([name, arguments]).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline())
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"])
    return answer["value"]
