"""Where the laboratory is: given, in the environment, or in the file that `vtlab up` leaves while it runs."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from vtlab.errors import PeerUnavailable

VMM, MONITOR, TRUST = "VTLAB_VMM", "VTLAB_MONITOR", "VTLAB_TRUST"


@dataclass(frozen=True)
class Addresses:
    """How to reach a laboratory.

    Attributes:
        vmm, monitor: addresses for clients, "unix:/path" or "HOST:PORT".
        trust: folder with the client's certificate.
    """

    vmm: str
    monitor: str
    trust: Path

    def environment(self) -> dict[str, str]:
        """The variables that find() reads."""
        return {VMM: self.vmm, MONITOR: self.monitor, TRUST: str(self.trust)}


def runtime_file() -> Path:
    """The well-known file of this user; its folder is private."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"vtlab-{os.getuid()}" / "lab.json"


def publish(addresses: Addresses) -> Path:
    """Writes the runtime file; the caller removes it at its end. Raises PermissionError if the folder is not ours."""
    path = runtime_file()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _require_private(path.parent)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"pid": os.getpid(), **asdict(addresses), "trust": str(addresses.trust)}))
    temporary.replace(path)
    return path


def _require_private(folder: Path) -> None:
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(13, "is not a private folder of this user", str(folder))


def published() -> Addresses | None:
    """What the runtime file says, if there is one and the process that wrote it lives."""
    path = runtime_file()
    try:
        _require_private(path.parent)
        content = json.loads(path.read_text())
        os.kill(int(content["pid"]), 0)
        return Addresses(str(content["vmm"]), str(content["monitor"]), Path(content["trust"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(vmm: str | None = None, monitor: str | None = None, trust: Path | str | None = None) -> Addresses:
    """The laboratory meant: each part as given, else from the environment, else from the runtime file.

    Raises:
        PeerUnavailable: no laboratory is known.
    """
    found = published()
    vmm = vmm or os.environ.get(VMM) or (found.vmm if found else "")
    monitor = monitor or os.environ.get(MONITOR) or (found.monitor if found else "")
    trust = trust or os.environ.get(TRUST) or (found.trust if found else "")
    if not vmm or not trust:
        missing = VMM if not vmm else TRUST
        raise PeerUnavailable("laboratory", f"none is running: start one with `vtlab up`, or set {missing}")
    return Addresses(vmm, monitor, Path(trust))
