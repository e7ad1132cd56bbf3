"""The image store and the checks of a machine's specification."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.unit.vmm.fakes import FakeLevel
from vmm import images
from vmm.images import ImageStore
from vmm.journal import Journal
from vmm.machines import Machines
from vtlab.errors import AlreadyExists, BadArgument, LimitExceeded, NotFound, PeerUnavailable
from vtlab.v1.vcpu_pb2 import BootImage
from vtlab.v1.vmm_pb2 import MachineSpec


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def test_add_and_copy(store: ImageStore, tmp_path: Path) -> None:
    sha256, size = store.add([b"ab", b"", b"c"])
    assert (sha256, size) == (hashlib.sha256(b"abc").digest(), 3)
    assert store.add([b"abc"])[0] == sha256
    store.copy(sha256, tmp_path / "copy")
    (tmp_path / "copy").chmod(0o600)
    (tmp_path / "copy").write_bytes(b"changed")
    store.copy(sha256, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"abc"


def test_limits(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE", 10)
    monkeypatch.setattr(images, "MAX_IMAGES", 1)
    with pytest.raises(LimitExceeded, match="10 bytes"):
        store.add([b"123456", b"123456"])
    with pytest.raises(BadArgument, match="chunk"):
        store.add([bytes(images.CHUNK + 1)])
    with pytest.raises(BadArgument, match="empty"):
        store.add([])
    assert list((tmp_path / "images").iterdir()) == []
    store.add([b"1"])
    with pytest.raises(LimitExceeded, match="1 images"):
        store.add([b"2"])


@pytest.mark.parametrize("sha256", [b"", b"..", bytes(32), bytes(31)])
def test_unknown_images(store: ImageStore, tmp_path: Path, sha256: bytes) -> None:
    with pytest.raises(NotFound):
        store.copy(sha256, tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------------- machines


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path, lambda vtl, present=True: FakeLevel(vtl), Journal(tmp_path / "journal"))


def good(machines: Machines, **changes: object) -> MachineSpec:
    sha256, _ = machines.images.add([b"\xf4"])
    values = {"ram_size": 2 << 20, "vp_count": 1, "image": BootImage(sha256=sha256)} | changes
    return MachineSpec(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vm", "changes", "field"),
    [
        ("", {}, "vm"),
        ("../x", {}, "vm"),
        ("a/b", {}, "vm"),
        ("x" * 64, {}, "vm"),
        ("vm", {"ram_size": 0}, "spec.ram_size"),
        ("vm", {"ram_size": (2 << 20) + 4096}, "spec.ram_size"),
        ("vm", {"ram_size": 1 << 60}, "spec.ram_size"),
        ("vm", {"vp_count": 0}, "spec.vp_count"),
        ("vm", {"vp_count": 17}, "spec.vp_count"),
    ],
)
def test_bad_specifications_name_the_field(machines: Machines, vm: str, changes: dict[str, object], field: str) -> None:
    with pytest.raises(BadArgument) as caught:
        machines.create(vm, good(machines, **changes))
    assert caught.value.subject == field
    assert machines.all() == []


def test_one_machine_at_a_time(machines: Machines, tmp_path: Path) -> None:
    spec = good(machines)
    machines.create("a", spec)
    with pytest.raises(AlreadyExists, match="'a'"):
        machines.create("a", spec)
    with pytest.raises(LimitExceeded, match="machine 'a'"):
        machines.create("b", spec)
    assert machines.get("a").describe().vm == "a"
    machines.destroy("a")
    with pytest.raises(NotFound, match="'a'"):
        machines.get("a")
    assert list((tmp_path / "machines").iterdir()) == []
    machines.create("b", spec)
    machines.close()
    assert machines.all() == []


def test_a_failed_create_frees_the_levels(tmp_path: Path) -> None:
    def dial(vtl: int, *, present: bool = True) -> FakeLevel:
        if refuse:
            raise PeerUnavailable(f"VTL{vtl}", "no answer")
        return FakeLevel(vtl)

    refuse = True
    machines = Machines(tmp_path, dial, Journal(tmp_path / "journal"))
    with pytest.raises(PeerUnavailable):
        machines.create("a", good(machines))
    refuse = False
    machines.create("a", good(machines))
    machines.close()


def test_what_a_killed_vmm_left_is_cleared(tmp_path: Path) -> None:
    log: list[str] = []
    left = tmp_path / "machines" / "old"
    left.mkdir(parents=True)
    (left / "ram.rw").write_bytes(b"old")
    machines = Machines(tmp_path, lambda vtl, present=True: FakeLevel(vtl, log), Journal(tmp_path / "journal"))
    machines.create("new", good(machines))
    assert not left.exists()
    assert log[:2] == ["detach 0", "attach 0 1"]
    machines.close()
