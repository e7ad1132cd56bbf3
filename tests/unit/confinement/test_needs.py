"""Which rights follow from what a server is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.channels import ServerConfig
from vtlab.confinement.confine import VARIABLE, Mode, mode
from vtlab.confinement.landlock import Access
from vtlab.confinement.needs import Needs, needs
from vtlab.errors import BadArgument
from vtlab.ram import Store, create_stores, store_folder
from vtlab.trust.certificates import ensure_trust


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    ensure_trust(tmp_path / "trust")
    for role in ("vmm", "guest", "monitor"):
        (tmp_path / role).mkdir()
    create_stores(tmp_path / "vmm")
    return tmp_path


def of(lab: Path, role: str, listen: tuple[str, ...] = (), rules: bytes = b"") -> Needs:
    return needs(
        ServerConfig(
            (f"unix:{lab / role / 'socket'}", *listen), lab / "trust", role, lab / role, rules=rules, memory=lab / "vmm"
        )
    )


def right(found: Needs, path: Path) -> Access:
    """As Landlock adds them up, from a file to the root."""
    return Access(sum({bit for one in (path, *path.parents) for bit in found.files.get(one, Access(0))}))


USE = Access.READ_FILE | Access.WRITE_FILE


@pytest.mark.parametrize("role", ["guest", "monitor", "vmm"])
@pytest.mark.parametrize(("store", "of_guest"), [
    (Store.WRITABLE, USE), (Store.SEALED, Access.READ_FILE), (Store.PRIVATE, Access(0)),
])  # fmt: skip
def test_memory_files(lab: Path, role: str, store: Store, of_guest: Access) -> None:
    found = right(of(lab, role), store_folder(lab / "vmm", store) / "machine.file") & USE
    assert found == (of_guest if role == "guest" else USE)


def test_the_guest_process_removes_and_makes_nothing_but_its_socket(lab: Path) -> None:
    found = of(lab, "guest")
    changing = Access.REMOVE_DIR | Access.REMOVE_FILE | Access.MAKE_REG | Access.MAKE_DIR | Access.MAKE_SYM
    changing |= Access.REFER | Access.TRUNCATE | Access.EXECUTE
    assert not any(access & changing for access in found.files.values())
    assert [path for path, access in found.files.items() if access & Access.MAKE_SOCK] == [lab / "guest"]


@pytest.mark.parametrize("role", ["guest", "monitor", "vmm"])
def test_each_reads_its_own_keys(lab: Path, role: str) -> None:
    found = of(lab, role)
    for other in ("guest", "monitor", "vmm", "operator", "ca"):
        expected = Access.READ_FILE if other == role else Access(0)
        assert right(found, lab / "trust" / other / "some.key") & Access.READ_FILE == expected


def test_the_monitor_s_store_is_its_own(lab: Path) -> None:
    store = lab / "monitor" / "sealed"
    assert right(of(lab, "monitor"), store) & USE == USE
    assert not right(of(lab, "guest"), store) & USE
    assert not right(of(lab, "vmm"), store) & USE


def test_rules_in_python_read_what_their_author_reads(lab: Path) -> None:
    path = Path("/home/somebody/hashes.txt")
    assert right(of(lab, "monitor", rules=b"shipped"), path) == Access.READ_FILE | Access.READ_DIR
    assert not right(of(lab, "monitor"), path)


def test_ports(lab: Path) -> None:
    assert not of(lab, "monitor").tcp
    found = of(lab, "monitor", ("127.0.0.1:7702",))
    assert (found.bind, found.connect, found.tcp) == ((7702,), (), True)
    config = ServerConfig((), lab / "trust", "vmm", lab / "vmm", guest="127.0.0.1:1", monitor="unix:/m")
    assert needs(config).connect == (1,)


def test_a_memory_folder_without_stores_is_told(tmp_path: Path, lab: Path) -> None:
    """A container that starts before the VMM made them has another uid, and modes tell what it may."""
    (tmp_path / "empty").mkdir()
    config = ServerConfig((), lab / "trust", "guest", lab / "guest", memory=tmp_path / "empty")
    assert "nothing tells its files apart" in " ".join(needs(config).notes)
    assert of(lab, "guest").notes == ()


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert mode() is Mode.AVAILABLE
    monkeypatch.setenv(VARIABLE, "required")
    assert mode() is Mode.REQUIRED
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(BadArgument, match="VTLAB_CONFINEMENT: 'yes' is neither"):
        mode()
