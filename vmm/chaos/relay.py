"""A relay between the VMM and a level, on Unix sockets, that can be cut or held up. It carries TLS and sees nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

_CHUNK = 64 << 10


class Relay:
    """Listens on one socket and connects to another for each connection that it takes."""

    def __init__(self, listen: Path, target: Path) -> None:
        self._target = str(target)
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def cut(self) -> None:
        """Every connection ends in the middle of what it carries; new ones are taken."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Nothing flows until release()."""
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        """Takes no connection any more and ends those that are."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.release()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self._target)
            except OSError:  # the level is being restarted
                near.close()
                far.close()
                continue
            with self._lock:
                self._sockets |= {near, far}
            threading.Thread(target=self._carry, args=(near, far), name="relay connection", daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        """Both ways, until either side ends."""
        with near, far:
            back = threading.Thread(target=self._pump, args=(far, near), name="relay pump", daemon=True)
            back.start()
            self._pump(near, far)
            back.join()
        with self._lock:
            self._sockets -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self._flowing.wait()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
