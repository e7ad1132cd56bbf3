"""From a kernel that may do everything to one that is guarded: TAKE_POLICY, LOCK_REGS, SIGNAL_END_OF_BOOT."""

from __future__ import annotations

import errno
import hashlib

import pytest

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.vtl0 import Vtl0
from vtlab.errors import WrongState
from vtlab.ram import RamFile
from vtlab.services import BOOT_ONLY, Service
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2


def test_the_policy_closes_memory(vtl0: Vtl0, policy: str) -> None:
    vtl0.write(image.VTL1, b"given to VTL1")
    assert vtl0.take_policy(policy).value == 0, vtl0.log()
    expected = {
        image.TEXT: "rk",
        image.TEXT + image.PAGE: "rk",
        image.PRIVILEGED: "rk",
        image.RODATA: "r",
        image.HYPERCALL_PAGE: "rk",
        image.VTL1: "",
        image.DATA: "rwu",
        image.FREE: "rwu",
        image.PML4: "rt",
        image.LOW_PD: "rt",
    }
    assert {gpa: vtl0.rights(gpa) for gpa in expected} == expected
    assert vtl0.file(image.TEXT) is RamFile.SEALED
    assert vtl0.file(image.VTL1) is RamFile.PRIVATE
    assert vtl0.read(image.VTL1, 13) == b"given to VTL1"
    assert vtl0.ram.views[RamFile.WRITABLE][image.VTL1 : image.VTL1 + 13] == bytes(13)


def test_the_end_of_boot_removes_the_code_that_writes_control_registers(vtl0: Vtl0, policy: str) -> None:
    vtl0.lock(policy)
    assert vtl0.rights(image.PRIVILEGED) == ""
    assert vtl0.file(image.PRIVILEGED) is RamFile.SEALED


def test_status_tells_what_is_in_force(locked: Vtl0, policy: str) -> None:
    status = locked.monitor.policy("vm")
    assert status.text == policy
    assert status.sha256 == hashlib.sha256(policy.encode()).digest()
    assert status.source == monitor_pb2.POLICY_SOURCE_GUEST
    assert status.locked
    assert {one.name for one in status.measurements} == {"text", "cr writers", "rodata", "patches", "certificates"}
    assert all(one.matches_image for one in status.measurements)
    text = next(one for one in status.measurements if one.name == "text")
    assert (text.gpa, text.size) == (image.TEXT, 2 * image.PAGE)
    assert text.sha256 == hashlib.sha256(image.text_bytes()).digest()
    assert "cr0: PE WP PG must be 1; else #GP" in status.rules
    assert "rodata: r-- 0x103000-0x104000, measured; else halt" in status.rules


@pytest.mark.parametrize(
    "gpa", [image.TEXT + 5, image.TEXT + 2 * image.PAGE - 1, image.PRIVILEGED + 100, image.RODATA + 4000]
)
def test_a_changed_kernel_is_refused(vtl0: Vtl0, policy: str, gpa: int) -> None:
    """Also where the change is behind the section, in the rest of its last page."""
    vtl0.write(gpa, b"\xeb")
    result = vtl0.take_policy(policy)
    assert result.value == -errno.EBADMSG
    assert result.returned.resolution.action == vcpu_pb2.ACTION_HALT
    assert vtl0.call(Service.LOCK_REGS).value == -errno.EPERM
    fault = vcpu_pb2.MemoryFault(gpa=image.TEXT, access=vcpu_pb2.ACCESS_KIND_WRITE)
    assert vtl0.intercept(memory_fault=fault).resolution.action == vcpu_pb2.ACTION_HALT
    assert "everything: halt" in vtl0.monitor.policy("vm").rules[-1]


@pytest.mark.parametrize(
    ("word", "action"), [("reset", vcpu_pb2.ACTION_RESET), ("refuse", vcpu_pb2.ACTION_UNSPECIFIED)]
)
def test_the_policy_chooses_what_a_mismatch_does(vtl0: Vtl0, policy: str, word: str, action: int) -> None:
    vtl0.write(image.TEXT, b"\xeb")
    result = vtl0.take_policy(policy.replace("rodata: halt", f"measurement: {word}"))
    assert result.value == -errno.EBADMSG
    assert result.returned.resolution.action == action


def test_bytes_changed_after_the_seal_are_not_what_is_measured(vtl0: Vtl0, policy: str) -> None:
    """VTL0 can write ram.rw at any time; what counts is ram.ro."""
    vtl0.before_resume = lambda number: vtl0.write(image.TEXT, b"too late")
    assert vtl0.take_policy(policy).value == 0
    assert vtl0.read(image.TEXT, 8) == image.text_bytes()[:8]


def test_a_policy_is_taken_once(vtl0: Vtl0, policy: str) -> None:
    assert vtl0.take_policy(policy).value == 0
    assert vtl0.take_policy(policy).value == -errno.EPERM


def test_services_wait_for_a_policy(vtl0: Vtl0) -> None:
    for service in set(Service) - {Service.PING, Service.TAKE_POLICY, Service.RESTORE}:
        assert vtl0.call(service).value == -errno.EPERM, service
    assert vtl0.call(Service.PING).value == 0


def test_boot_only_services_end_with_the_boot(locked: Vtl0) -> None:
    for service in BOOT_ONLY:
        assert locked.call(service, image.FREE, 1).value == -errno.EPERM, service


def test_an_unknown_service_is_refused(locked: Vtl0) -> None:
    assert locked.call(0x1FFEF).value == -errno.ENOSYS


def test_services_that_the_policy_leaves_out_are_refused(vtl0: Vtl0, policy: str) -> None:
    vtl0.lock(policy + "services: [PING]\n")
    assert vtl0.call(Service.PING).value == 0
    assert vtl0.call(Service.PATCH_TEXT).value == -errno.ENOSYS


@pytest.mark.parametrize(
    ("pa", "size", "number"),
    [
        (image.FREE, 0, errno.EINVAL),
        (image.FREE, (64 << 10) + 1, errno.EINVAL),
        (image.RAM_SIZE - 4, 8, errno.EFAULT),
        (1 << 63, 8, errno.EFAULT),
        (image.RAM_SIZE, 8, errno.EFAULT),
    ],
)
def test_bad_arguments_of_take_policy(vtl0: Vtl0, pa: int, size: int, number: int) -> None:
    assert vtl0.call(Service.TAKE_POLICY, pa, size).value == -number
    assert vtl0.protects == 0


def test_a_bad_policy_changes_nothing(vtl0: Vtl0, policy: str) -> None:
    assert vtl0.take_policy(policy.replace(".rodata", ".absent")).value == -errno.EINVAL
    assert vtl0.protects == 0
    assert "guest policy:20: memory.2.section: no section .absent is loaded by image" in vtl0.log()[-1]
    assert vtl0.take_policy(policy).value == 0


def test_registers_must_satisfy_the_policy_when_they_are_locked(vtl0: Vtl0, policy: str) -> None:
    assert vtl0.take_policy(policy).value == 0
    vtl0.registers.cr4 &= ~(1 << 20)
    assert vtl0.call(Service.LOCK_REGS).value == -errno.EINVAL
    assert vtl0.call(Service.SIGNAL_END_OF_BOOT).value == -errno.EINVAL
    vtl0.registers.cr4 |= 1 << 20
    result = vtl0.call(Service.LOCK_REGS)
    assert result.value == 0
    msrs = [update.msr for update in result.returned.updates if update.HasField("msr")]
    assert [(msr.index, msr.value) for msr in msrs] == [(0x277, 0x0007040600070406)]
    assert sum(update.HasField("intercepts") for update in result.returned.updates) == 1


def test_an_operators_policy_overrides_until_the_guests_is_taken(vtl0: Vtl0, policy: str) -> None:
    operators = policy.replace("name: test", "name: experiment")
    vtl0.monitor.set_policy("vm", operators, "mine.yaml")
    assert vtl0.take_policy(policy).value == 0
    status = vtl0.monitor.policy("vm")
    assert status.source == monitor_pb2.POLICY_SOURCE_OPERATOR
    assert "name: experiment" in status.text
    with pytest.raises(WrongState):
        vtl0.monitor.set_policy("vm", policy, "mine.yaml")


def test_nothing_is_replaced_once_locked(vtl0: Vtl0, policy: str) -> None:
    vtl0.monitor.lock_policy("vm")
    with pytest.raises(WrongState, match="locked"):
        vtl0.monitor.set_policy("vm", policy, "mine.yaml")
    vtl0.lock(policy)


def test_a_failed_protection_stops_everything(vtl0: Vtl0, policy: str) -> None:
    vtl0.protect_status = 5
    result = vtl0.take_policy(policy)
    assert result.value == -errno.EIO
    assert result.returned.resolution.action == vcpu_pb2.ACTION_HALT
    vtl0.protect_status = 0
    assert vtl0.call(Service.PING).returned.resolution.action == vcpu_pb2.ACTION_HALT


def test_tables_that_a_rule_would_seal_are_told(vtl0: Vtl0, policy: str) -> None:
    """A nested-read-only page table faults on every walk: the guest could not run on."""
    text = policy.replace("page_tables: {guard: true}\n", "").replace("  cr3: page_tables\n", "")
    sealed = text.replace("memory:\n", "memory:\n  - {name: oops, gpa: 0x200000, size: 4096, access: r--}\n")
    assert vtl0.take_policy(sealed).value == -errno.EINVAL
    assert "rule 'oops' seals the page table at 0x200000" in vtl0.log()[-1]
    private = text.replace(
        "memory:\n", "memory:\n  - {name: oops, gpa: 0x200000, size: 4096, access: ---, private: true}\n"
    )
    assert vtl0.take_policy(private).value == -errno.EINVAL
    assert "takes the page table at 0x200000 away" in vtl0.log()[-1]


def test_a_section_mapped_elsewhere_is_not_taken_for_the_image(vtl0: Vtl0, policy: str) -> None:
    """The guest's tables point its text somewhere else: sealing the loaded bytes would guard nothing."""
    entry = image.KERNEL_PT + (image.TEXT >> 12) * 8
    vtl0.write(entry, (image.FREE | image.P).to_bytes(8, "little"))
    assert vtl0.take_policy(policy).value == -errno.EINVAL
    assert "is mapped at 0x140000, but was loaded at 0x100000" in vtl0.log()[-1]


def test_secrets_are_in_private_memory_and_wiped(vtl0: Vtl0, policy: str) -> None:
    vtl0.lock(policy)
    end = image.VTL1 + 2 * image.PAGE
    private = vtl0.ram.views[RamFile.PRIVATE]
    assert private[end - 256 : end - 240] == b"vtlab secrets 1\0"
    assert b"vtlab secrets" not in vtl0.ram.views[RamFile.WRITABLE][image.VTL1 : end]
    vtl0.monitor.detach("vm")
    assert private[image.VTL1 : end] == bytes(2 * image.PAGE)


def test_registers_are_free_before_the_lock(vtl0: Vtl0, policy: str) -> None:
    assert vtl0.take_policy(policy).value == 0
    write = vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR0, old_value=0x80010001, new_value=0x80000001)
    assert vtl0.intercept(register_write=write).resolution.action == vcpu_pb2.ACTION_COMMIT
