"""How the VMM comes to its levels."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from vmm import server
from vtlab.channels import ServerConfig, dial
from vtlab.errors import PeerUnavailable, Unsupported
from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role


def levels(folder: Path) -> server.Levels:
    trust = ensure_trust(folder / "trust")
    return server.Levels(ServerConfig((), trust, "vmm", folder, guest=f"unix:{folder}/guest.sock"))


def test_who_is_being_restarted_need_not_answer_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(address: str, trust: Path, role: Role, peer: Role) -> grpc.Channel:
        return dial(address, trust, role, peer, timeout=0.01)

    monkeypatch.setattr(server, "dial", at_once)
    made = levels(tmp_path)
    with pytest.raises(PeerUnavailable, match="no such socket"):
        made(0)
    assert made(0, present=False).name == f"guest at unix:{tmp_path}/guest.sock"
    with pytest.raises(Unsupported, match="no address of a monitor"):
        made(1, present=False)
    made.close()
