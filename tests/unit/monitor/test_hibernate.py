"""Hibernation: what VTL1 seals, what it puts back, and all that it does not take for the image."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import CR0, CR4, EFER, Result, Vtl0, boot_image
from vtl1_monitor.hibernation import BadImage, read_image, seal, unseal
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.sealed import SealedStore
from vtl1_monitor.tickets import Ticket, Tickets
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.services import HIBERNATION_HEADER, HIBERNATION_MAGIC, Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Msr

AREA, ROOM = 0x300000, 64
RIP, RSP = image.KERNEL + image.TEXT, image.KERNEL + image.DATA
SECRET = b"what only VTL1 has"
KEPT = [image.TEXT, image.TEXT + PAGE_SIZE, image.RODATA, image.PATCHES, image.DATA]


def layout(numbers: list[int], pages: bytes, state: bytes = b"") -> bytes:
    header = HIBERNATION_HEADER.pack(HIBERNATION_MAGIC, len(numbers), len(state), RIP, RSP)
    index = struct.pack(f"<{len(numbers)}Q", *numbers)
    return header.ljust(PAGE_SIZE, b"\0") + index.ljust(-(-len(index) // PAGE_SIZE) * PAGE_SIZE, b"\0") + pages + state


class Kernel:
    """The made-up kernel, which keeps some pages on a disk."""

    def __init__(self, vtl0: Vtl0, folder: Path) -> None:
        self.vtl0, self.folder = vtl0, folder
        self.disk = b""
        self.generation = 1
        vtl0.state.registers.CopyFrom(vtl0.registers)
        vtl0.state.gdtr.base = 0x1234
        vtl0.state.msrs.append(registers_pb2.MsrValue(index=Msr.LSTAR, value=0x77))
        vtl0.state.msrs.append(registers_pb2.MsrValue(index=Msr.APIC_BASE, value=0x88))

    def copy(self, places: list[int] | None = None) -> int:
        """A copy of these pages as VTL0 reads them, at AREA; how many pages the image has."""
        places = KEPT if places is None else places
        pages = b"".join(self.vtl0.read(place, PAGE_SIZE) for place in places)
        self.vtl0.write(AREA, layout([place // PAGE_SIZE for place in places], pages))
        return 2 + len(places) + ROOM

    def seal(self, pages: int | None = None) -> Result:
        pages = self.copy() if pages is None else pages
        result = self.vtl0.call(Service.HIBERNATE, AREA, pages)
        self.disk = self.vtl0.read(AREA, pages * PAGE_SIZE)
        return result

    def restart(self) -> None:
        """Power off and on: memory is zero but for the boot image, and VTL1 knows what outlives that."""
        vtl0 = self.vtl0
        vtl0.monitor.detach("vm", reset=True)
        for file in RamFile:
            vtl0.ram.views[file][:] = bytes(image.RAM_SIZE)
        vtl0.access.clear()
        vtl0.store.clear()
        self.attach()
        image.kernel().load(vtl0.write)

    def boot(self) -> None:
        """Another kernel starts, and asks for protection."""
        self.restart()
        image.build_page_tables(self.vtl0.write)
        assert self.vtl0.take_policy(POLICY).value == 0

    def attach(self) -> None:
        vtl0 = self.vtl0
        self.generation += 1
        request = vcpu_pb2.AttachRequest(
            vm="vm",
            generation=self.generation,
            vtl=1,
            vp_count=1,
            ram_size=image.RAM_SIZE,
            memory_directory=str(self.folder),
            image=boot_image(self.folder),
        )
        vtl0.monitor.attach(request)
        vtl0._sequence = [0]

    def restore(self) -> Result:
        self.vtl0.write(AREA, self.disk)
        result = self.vtl0.call(Service.RESTORE, AREA, len(self.disk) // PAGE_SIZE)
        for update in result.returned.updates:
            if update.HasField("protection"):
                self.vtl0.apply(update.protection)
        return result

    def refused(self, result: Result) -> str:
        """The reason of a RESET."""
        assert result.value == -errno.EBADMSG
        assert result.returned.resolution.action == vcpu_pb2.ACTION_RESET
        assert not any(update.HasField("start_processor") for update in result.returned.updates)
        assert self.vtl0.machine.broken
        return str(result.returned.resolution.reason)


@pytest.fixture
def kernel(locked: Vtl0, tmp_path: Path) -> Kernel:
    locked.ram.views[RamFile.PRIVATE][image.VTL1 : image.VTL1 + len(SECRET)] = SECRET
    return Kernel(locked, tmp_path)


def test_all_comes_back(kernel: Kernel) -> None:
    vtl0 = kernel.vtl0
    codes, rules = bytes(vtl0.machine.memory.codes), vtl0.machine.rules
    nonce_key = vtl0.machine.secrets.block
    vtl0.write(image.DATA, b"changed at run time")
    assert kernel.seal().value > 0, vtl0.log()
    kernel.restart()
    result = kernel.restore()
    assert result.value == 0, vtl0.log()
    machine = vtl0.machine
    assert machine.locked
    assert (bytes(machine.memory.codes), machine.rules, machine.secrets.block) == (codes, rules, nonce_key)
    assert vtl0.file(image.TEXT) is RamFile.SEALED
    assert vtl0.read(image.TEXT, 2 * PAGE_SIZE) == image.text_bytes()
    assert vtl0.read(image.DATA, 19) == b"changed at run time"
    assert vtl0.ram.views[RamFile.PRIVATE][image.VTL1 : image.VTL1 + len(SECRET)] == SECRET
    assert vtl0.rights(image.PRIVILEGED) == ""
    writers = vtl0.ram.views[RamFile.SEALED][image.PRIVILEGED : image.PRIVILEGED + 4]
    assert writers == b"\x0f\x22\xc0\xc3"  # closed, but it is there
    vtl0.registers.cr4 = CR4
    assert vtl0.call(Service.WRITE_CONTROL_REGISTER, 4, 0).value < 0


def test_the_processor_goes_on_where_the_kernel_said_with_its_pinned_msrs(kernel: Kernel) -> None:
    kernel.seal()
    kernel.restart()
    updates = kernel.restore().returned.updates
    (state,) = (one.start_processor.state for one in updates if one.HasField("start_processor"))
    registers = state.registers
    assert (registers.rip, registers.rsp, registers.cr0, registers.cr4, registers.efer) == (RIP, RSP, CR0, CR4, EFER)
    assert state.gdtr.base == 0x1234
    assert [(one.index, one.value) for one in state.msrs] == [(Msr.LSTAR, 0x77)]
    assert any(one.intercepts.cr4_mask for one in updates if one.HasField("intercepts"))
    assert any(one.HasField("invalidate_code") for one in updates)


def test_nothing_is_open_while_it_is_put_back(kernel: Kernel) -> None:
    vtl0 = kernel.vtl0
    kernel.seal()
    kernel.restart()
    seen = []

    def look(_number: int) -> None:
        seen.append({vtl0.rights(page * PAGE_SIZE) for page in range(image.RAM_SIZE // PAGE_SIZE)})

    vtl0.before_resume = look
    vtl0.write(AREA, kernel.disk)
    result = vtl0.call(Service.RESTORE, AREA, len(kernel.disk) // PAGE_SIZE)
    assert seen[-1] == {""}
    assert result.returned.stop_all


CHANGES: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "a page": (lambda disk: disk.__setitem__(2 * PAGE_SIZE, disk[2 * PAGE_SIZE] ^ 1), "not those that were sealed"),
    "a number": (lambda disk: disk.__setitem__(PAGE_SIZE + 32, disk[PAGE_SIZE + 32] + 1), "not those that were sealed"),
    "VTL1's state": (lambda disk: disk.__setitem__((2 + len(KEPT)) * PAGE_SIZE + 200, 0), "was changed"),
    "its number": (lambda disk: disk.__setitem__((2 + len(KEPT)) * PAGE_SIZE + 48, 9), "number 9"),
    "its machine": (lambda disk: disk.__setitem__((2 + len(KEPT)) * PAGE_SIZE + 16, 0), "another machine's"),
    "the header": (lambda disk: disk.__setitem__(0, 0), "no image of memory"),
    "no state": (lambda disk: disk.__setitem__(slice(24, 32), bytes(8)), "is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_a_reset(kernel: Kernel, change: str) -> None:
    forge, reason = CHANGES[change]
    kernel.seal()
    disk = bytearray(kernel.disk)
    forge(disk)
    assert bytes(disk) != kernel.disk
    kernel.disk = bytes(disk)
    kernel.restart()
    assert reason in kernel.refused(kernel.restore())


def test_an_image_is_restored_once(kernel: Kernel) -> None:
    kernel.seal()
    kernel.restart()
    assert kernel.restore().value == 0
    kernel.restart()
    assert "restored already" in kernel.refused(kernel.restore())


def test_an_older_image_is_refused(kernel: Kernel) -> None:
    kernel.seal()
    old = kernel.disk
    kernel.vtl0.call(Service.HIBERNATE)
    kernel.seal()
    kernel.disk = old
    kernel.restart()
    assert "number 1, and number 2" in kernel.refused(kernel.restore())


@pytest.mark.parametrize(
    "goes_on",
    [
        lambda kernel: kernel.vtl0.call(Service.HIBERNATE),
        lambda kernel: kernel.vtl0.call(Service.CHALLENGE, image.FREE),
        lambda kernel: kernel.vtl0.monitor.lock_policy("vm"),
        lambda kernel: kernel.boot(),
    ],
    ids=["given up", "a service was called", "locked by the operator", "another boot took a policy"],
)
def test_the_machine_that_went_on_cannot_go_back(kernel: Kernel, goes_on: Callable[[Kernel], object]) -> None:
    kernel.seal()
    goes_on(kernel)
    kernel.restart()
    assert "went on without it" in kernel.refused(kernel.restore())


def test_the_image_of_a_destroyed_machine_of_the_same_name_is_foreign(kernel: Kernel) -> None:
    kernel.seal()
    kernel.vtl0.monitor.detach("vm")
    kernel.attach()
    kernel.vtl0.access.clear()
    kernel.vtl0.store.clear()
    assert "number 0 was sealed last" in kernel.refused(kernel.restore())


def test_a_copy_that_is_not_what_vtl1_guards_is_not_sealed(kernel: Kernel) -> None:
    pages = kernel.copy()
    kernel.vtl0.write(AREA + 2 * PAGE_SIZE + 5, b"forged")
    assert kernel.seal(pages).value == -errno.EBADMSG
    assert "is not what VTL1 guards there" in kernel.vtl0.log()[-1]
    assert kernel.vtl0.rights(AREA) == "rwu"  # VTL0's again


@pytest.mark.parametrize("place", [image.VTL1, image.PRIVILEGED, AREA])
def test_vtl0_does_not_keep_what_it_may_not_read(kernel: Kernel, place: int) -> None:
    kernel.copy([place])
    assert kernel.seal(3 + ROOM).value == -errno.EBADMSG
    assert "cannot be kept by VTL0" in kernel.vtl0.log()[-1]


def test_too_little_room_for_what_is_sealed(kernel: Kernel) -> None:
    pages = kernel.copy()
    assert kernel.seal(pages - ROOM).value == -errno.EBADMSG
    assert "are too few" in kernel.vtl0.log()[-1]


def test_an_image_is_sealed_and_stays_so(kernel: Kernel) -> None:
    kernel.seal()
    assert kernel.vtl0.rights(AREA) == "r"
    kernel.vtl0.call(Service.HIBERNATE)
    assert kernel.vtl0.rights(AREA) == "rwu"


def test_a_policy_may_refuse_it(vtl0: Vtl0, tmp_path: Path) -> None:
    vtl0.lock(POLICY + "lifecycle: {hibernate: refuse}\n")
    assert Kernel(vtl0, tmp_path).seal().value == -errno.EPERM


@pytest.mark.parametrize(("pa", "pages"), [(AREA + 8, 8), (AREA, 0), (AREA, 1 << 40), (image.RAM_SIZE - PAGE_SIZE, 2)])
def test_arguments_that_name_no_pages(kernel: Kernel, pa: int, pages: int) -> None:
    assert kernel.vtl0.call(Service.HIBERNATE, pa, pages).value == -errno.EINVAL
    kernel.restart()
    assert kernel.vtl0.call(Service.RESTORE, pa, pages).value == -errno.EINVAL
    assert not kernel.vtl0.machine.broken


def test_a_guarded_kernel_cannot_be_put_back(kernel: Kernel) -> None:
    kernel.seal()
    assert kernel.vtl0.call(Service.RESTORE, AREA, 10).value == -errno.EPERM


def test_what_is_expected_outlives_the_monitor(kernel: Kernel, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    vtl0 = kernel.vtl0
    vtl0.monitor.close()
    vtl0.store.clear()
    vtl0.access.clear()
    vtl0.monitor = Monitor((), SealedStore(folder))
    kernel.attach()
    image.kernel().load(vtl0.write)
    image.build_page_tables(vtl0.write)
    vtl0.lock(POLICY)
    assert kernel.seal().value > 0
    vtl0.monitor.detach("vm", reset=True)
    vtl0.monitor = Monitor((), SealedStore(folder))  # the one before was killed
    vtl0.monitor.restore()
    for file in RamFile:
        vtl0.ram.views[file][:] = bytes(image.RAM_SIZE)
    vtl0.store.clear()
    vtl0.access.clear()
    kernel.attach()
    assert kernel.restore().value == 0, vtl0.log()


def test_tickets_are_used_once_and_numbers_never_come_again() -> None:
    tickets = Tickets()
    assert (tickets.last("vm"), tickets.take("vm")) == (0, None)
    first = tickets.issue("vm")
    second = tickets.issue("vm")
    assert (first.number, second.number) == (1, 2)
    assert first.key != second.key
    assert Tickets(tickets.kept()).take("vm") == second.key
    assert tickets.take("vm") == second.key
    assert tickets.take("vm") is None
    assert tickets.issue("vm").number == 3
    tickets.forget("vm")
    assert tickets.kept() == {}


@given(st.binary(max_size=64), st.integers(0, 1 << 20))
def test_a_bit_of_a_sealed_state_flipped(content: bytes, at: int) -> None:
    ticket = Ticket(7, bytes(32))
    sealed = seal(content, "vm", ticket)
    assert unseal(sealed, "vm", 7, bytes(32)) == content
    changed = bytearray(sealed)
    changed[at % len(sealed)] ^= 1
    with pytest.raises(BadImage):
        unseal(bytes(changed), "vm", 7, bytes(32))


@given(st.binary(max_size=3 * PAGE_SIZE), st.integers(0, 1 << 64 - 1), st.integers(0, 1 << 64 - 1))
def test_any_bytes_are_an_image_or_refused(data: bytes, count: int, size: int) -> None:
    header = HIBERNATION_HEADER.pack(HIBERNATION_MAGIC, count % (1 << 64), size % (1 << 64), 0, 0)
    data = (header + data).ljust(4 * PAGE_SIZE, b"\0")
    for one in (data, data[32:].ljust(4 * PAGE_SIZE, b"\0")):
        try:
            found = read_image(one, 1024)
        except BadImage:
            continue
        assert len(found.content) == len(found.numbers) * PAGE_SIZE
