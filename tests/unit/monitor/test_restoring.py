"""A monitor that dies at every point of a machine's life, and the one that takes its place from the sealed store."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.test_modules import Loader
from tests.unit.monitor.test_page_tables import NEW_ROOT, entry, table
from tests.unit.monitor.vtl0 import Vtl0, boot_image
from vtl1_monitor import snapshot
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.sealed import BrokenSeal, SealedStore
from vtlab.errors import NotFound
from vtlab.ram import RamFile
from vtlab.services import PageTableOperation, Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import MsrAccess, RegisterWrite


class Mortal(Vtl0):
    """VTL0 whose monitor dies around one enter.

    Attributes:
        dies_at: number of the enter, from 1; 0 for never.
        answered: it dies after it has answered, and the answer is lost; else before it has begun.
        enters: so far.
    """

    def __init__(self, directory: Path, folder: Path, dies_at: int, answered: bool) -> None:
        self.folder = folder
        self.dies_at, self.answered = dies_at, answered
        self.enters = 0
        super().__init__(directory, image.kernel(certificates=keys.der("module signer")))
        request = vcpu_pb2.AttachRequest(
            vm="vm",
            generation=1,
            vtl=1,
            vp_count=1,
            ram_size=image.RAM_SIZE,
            memory_directory=str(directory),
            image=boot_image(directory),
        )
        self.monitor = Monitor((), SealedStore(folder))
        self.monitor.attach(request)

    def die(self) -> None:
        """Nothing is wiped: kill -9."""
        self.monitor = Monitor((), SealedStore(self.folder))
        self.monitor.restore()
        assert self.monitor.reconnect("vm", 1)

    def enter(self, reason: vcpu_pb2.EnterReason.ValueType, vp_index: int = 0, **fields: object) -> vcpu_pb2.Exit:
        self.enters += 1
        if self.enters != self.dies_at:
            return super().enter(reason, vp_index, **fields)
        if not self.answered:
            self.die()
            return super().enter(reason, vp_index, **fields)
        lost = super().enter(reason, vp_index, **fields)
        self.die()
        self._sequence[vp_index] -= 1
        again = super().enter(reason, vp_index, **fields)
        assert again == lost
        return again


def life(vtl0: Mortal) -> None:
    """A kernel deprivileges itself, and lives on with every kind of service."""
    vtl0.lock(f"{POLICY}modules: {{certificate_section: .certificates}}\npatches: {{section: .patches}}\n")
    loader = Loader(vtl0)
    assert loader.validate().value == 1, vtl0.log()
    assert vtl0.patch(image.PATCH_SITE, image.JUMP).value == 0, vtl0.log()
    table(vtl0, NEW_ROOT, {511: entry(vtl0, image.PML4 + 511 * 8), 0: entry(vtl0, image.PML4)})
    for operation in (PageTableOperation.ADD_ROOT, PageTableOperation.RELEASE):
        assert vtl0.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, operation).value == 0, vtl0.log()
    assert vtl0.call(Service.CHALLENGE, image.FREE).value == 0
    wrong = vtl0.call(Service.AUTHENTICATE, image.FREE, 7)
    assert wrong.value == -errno.EINVAL
    write = RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4, old_value=vtl0.registers.cr4, new_value=0x20)
    assert vtl0.intercept(register_write=write).resolution.action == vcpu_pb2.ACTION_DENY
    assert vtl0.intercept(msr=MsrAccess(index=0xC0000082, write=True, new_value=5)).resolution.action == 1
    assert vtl0.call(Service.PING).value == 0
    assert vtl0.call(Service.UNLOAD_MODULE, 1).value == 0, vtl0.log()
    assert vtl0.call(Service.UNLOAD_MODULE, 1).value == -errno.ENOENT, "once"


def result(vtl0: Mortal) -> object:
    """What must not depend on who died when: rights and places of pages, what VTL1 knows, sealed bytes."""
    machine = vtl0.machine
    pages = bytes(machine.memory.codes)
    sealed = [vtl0.read(gpa, 4096) for gpa in (image.TEXT, image.RODATA, image.PML4, image.KERNEL_PT)]
    files = {gfn: file for gfn, file in vtl0.store.items() if file is not RamFile.WRITABLE}
    rights = {gfn: vtl0.rights(gfn << 12) for gfn in files}
    assert machine.guard is not None
    counts = dict(machine.guard._references), dict(machine.guard.levels), machine.guard.roots
    flags = machine.taken, machine.end_of_boot, machine.broken, machine.modules, machine.next_token, machine.rules
    return pages, files, rights, sealed, counts, flags, machine.status().SerializeToString()


def made(tmp_path: Path, name: str, dies_at: int, answered: bool = False) -> Mortal:
    directory, folder = tmp_path / f"{name}-ram", tmp_path / f"{name}-state"
    directory.mkdir()
    folder.mkdir()
    return Mortal(directory, folder, dies_at, answered)


@pytest.mark.parametrize("answered", [False, True])
def test_whoever_dies_when_the_end_is_the_same(tmp_path: Path, answered: bool) -> None:
    undisturbed = made(tmp_path, "whole", 0)
    life(undisturbed)
    expected = result(undisturbed)
    assert undisturbed.enters > 20
    for number in range(1, undisturbed.enters + 1):
        vtl0 = made(tmp_path, f"{number}", number, answered)
        life(vtl0)
        assert result(vtl0) == expected, f"died at enter {number}"
        vtl0.close()


def test_what_an_operator_set_is_kept(tmp_path: Path) -> None:
    vtl0 = made(tmp_path, "vm", 0)
    vtl0.monitor.set_policy("vm", POLICY, "operator's")
    vtl0.monitor.lock_policy("vm")
    vtl0.die()
    status = vtl0.monitor.policy("vm")
    assert (status.text, status.locked) == (POLICY, True)
    vtl0.monitor.detach("vm", reset=True)
    again = Monitor((), SealedStore(vtl0.folder))
    again.restore()
    assert again._overrides["vm"].text == POLICY


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:20],
    "cut": lambda data: data[:-1],
    "magic": lambda data: _flip(data, 3),
    "counter": lambda data: _flip(data, 17),
    "nonce": lambda data: _flip(data, 30),
    "content": lambda data: _flip(data, len(data) // 2),
    "tag": lambda data: _flip(data, len(data) - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_no_machine(tmp_path: Path, damage: str) -> None:
    vtl0 = made(tmp_path, "vm", 0)
    vtl0.lock(POLICY)
    path = vtl0.folder / "sealed"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(BrokenSeal):
        SealedStore(vtl0.folder).unseal()
    monitor = Monitor((), SealedStore(vtl0.folder))
    monitor.restore()
    with pytest.raises(NotFound, match="sealed store"):
        monitor.reconnect("vm", 1)


def test_an_old_store_is_refused(tmp_path: Path) -> None:
    """Whoever can write the folder puts an earlier store back, of before the lock."""
    vtl0 = made(tmp_path, "vm", 0)
    path = vtl0.folder / "sealed"
    old = path.read_bytes()
    vtl0.lock(POLICY)
    path.write_bytes(old)
    with pytest.raises(BrokenSeal, match="is an old one"):
        SealedStore(vtl0.folder).unseal()


def test_a_store_is_not_readable_without_its_key(tmp_path: Path) -> None:
    store = SealedStore(tmp_path)
    store.seal(b"a secret")
    assert b"a secret" not in (tmp_path / "sealed").read_bytes()
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in tmp_path.iterdir())
    assert SealedStore(tmp_path).unseal() == b"a secret"
    (tmp_path / "sealed.key").unlink()
    with pytest.raises(BrokenSeal, match="was changed"):
        SealedStore(tmp_path).unseal()


def test_a_death_between_store_and_counter_is_no_rollback(tmp_path: Path) -> None:
    store = SealedStore(tmp_path)
    store.seal(b"1")
    counter = (tmp_path / "sealed.counter").read_bytes()
    store.seal(b"2")
    (tmp_path / "sealed.counter").write_bytes(counter)
    assert SealedStore(tmp_path).unseal() == b"2"


def test_what_was_wiped_does_not_come_back(tmp_path: Path) -> None:
    store = SealedStore(tmp_path)
    store.seal(b"1")
    old = (tmp_path / "sealed").read_bytes()
    store.wipe()
    assert SealedStore(tmp_path).unseal() is None
    (tmp_path / "sealed").write_bytes(old)
    with pytest.raises(BrokenSeal, match="is an old one"):
        SealedStore(tmp_path).unseal()


def test_only_parts_of_a_machine_are_loaded() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is no part of a machine"):
        snapshot.load_value(pickle.dumps(Path.unlink), snapshot.Sealed)
