"""UPGRADE: newer rules, signed, for every vCPU at once; refused, the old ones stay whole."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import CR4, Vtl0
from vtlab.client.kexec import policy_upgrade
from vtlab.services import Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr4

EKEYREJECTED = 129
FIRST = POLICY + "modules: {certificate_section: .certificates}\nlifecycle: {upgrade: signed}\n"
STRICTER = FIRST.replace("must_be_0: [VMXE]", "must_be_0: [VMXE, TSD]")


@pytest.fixture
def certificates() -> bytes:
    return keys.der("good")


@pytest.fixture
def policy() -> str:
    return FIRST


def signed(text: str, version: int, name: str = "good") -> bytes:
    data = policy_upgrade(text, version)
    return keys.appended(data, keys.cms(data, name))


def upgrade(vtl0: Vtl0, data: bytes) -> int:
    vtl0.write(image.FREE, data)
    return vtl0.call(Service.UPGRADE, image.FREE, len(data)).value


def write_cr4(vtl0: Vtl0, value: int) -> vcpu_pb2.Action.ValueType:
    write = vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4, old_value=CR4, new_value=value)
    return vtl0.intercept(register_write=write).resolution.action


def test_a_newer_policy_holds_from_its_call_on(locked: Vtl0) -> None:
    assert write_cr4(locked, CR4 | Cr4.TSD) == vcpu_pb2.ACTION_COMMIT
    assert upgrade(locked, signed(STRICTER, 1)) == 0, locked.log()
    assert write_cr4(locked, CR4 | Cr4.TSD) == vcpu_pb2.ACTION_DENY
    assert write_cr4(locked, CR4 & ~Cr4.SMEP) == vcpu_pb2.ACTION_DENY
    status = locked.machine.status()
    assert (status.version, status.text, status.locked) == (1, STRICTER, True)
    assert locked.rights(image.TEXT) == "rk"


def test_every_vcpu_is_stopped_until_it_has_the_new_filter(
    tmp_path: Path, kernel_file: image.KernelImage, policy: str
) -> None:
    vtl0 = Vtl0(tmp_path, kernel_file, vp_count=2)
    try:
        vtl0.lock(policy)
        data = signed(STRICTER, 1)
        vtl0.write(image.FREE, data)
        returned = vtl0.call(Service.UPGRADE, image.FREE, len(data)).returned
        own = [one.intercepts for one in returned.updates if one.HasField("intercepts")]
        peers = {one.vp_index: one.update.intercepts for one in returned.peers}
        assert returned.stop_all
        assert own[0].cr4_mask & Cr4.TSD
        assert peers[1].cr4_mask & Cr4.TSD
    finally:
        vtl0.close()


@pytest.mark.parametrize(
    ("data", "result", "why"),
    [
        (lambda: signed(STRICTER, 3), -EKEYREJECTED, "version 3 is not newer than 3"),
        (lambda: signed(FIRST, 2), -EKEYREJECTED, "version 2 is not newer than 3"),
        (lambda: signed(STRICTER, 4, "stranger"), -EKEYREJECTED, "nobody known"),
        (lambda: signed(STRICTER, 4).replace(b"name: test", b"name: lest"), -EKEYREJECTED, "does not match"),
        (lambda: policy_upgrade(STRICTER, 4), -EKEYREJECTED, "not signed"),
        (lambda: keys.appended(b"short", keys.cms(b"short", "good")), -EKEYREJECTED, "truncated"),
        (lambda: signed("nonsense: [", 4), -errno.EINVAL, "signed policy"),
        (lambda: signed(STRICTER.replace("access: r--", "access: rw-", 1), 4), -errno.EINVAL, ""),
        (lambda: signed(STRICTER.replace("name: rodata, section", "name: other, section"), 4), -errno.EINVAL, ""),
        (lambda: signed(STRICTER.replace("cr3: page_tables", "cr3: frozen"), 4), -errno.EINVAL, "registers.cr3"),
        (lambda: signed(STRICTER.replace("PE, PG, WP", "PE, PG, WP, AM"), 4), -errno.EINVAL, "cr0"),
    ],
    ids=["same", "older", "stranger", "changed", "unsigned", "short", "yaml", "rights", "rule", "cr3", "registers"],
)
def test_a_refused_policy_leaves_the_old_one(locked: Vtl0, data: Callable[[], bytes], result: int, why: str) -> None:
    assert upgrade(locked, signed(STRICTER, 3)) == 0
    assert upgrade(locked, data()) == result
    assert why in locked.log()[-1]
    assert locked.machine.status().version == 3
    assert write_cr4(locked, CR4 | Cr4.TSD) == vcpu_pb2.ACTION_DENY


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_sizes(locked: Vtl0, size: int) -> None:
    assert locked.call(Service.UPGRADE, image.FREE, size).value == -errno.EINVAL


def test_refused_by_default_before_the_end_of_boot_and_under_the_operators_lock(vtl0: Vtl0) -> None:
    assert vtl0.take_policy(FIRST).value == 0
    assert upgrade(vtl0, signed(STRICTER, 1)) == -errno.EPERM
    assert vtl0.call(Service.LOCK_REGS).value == vtl0.call(Service.SIGNAL_END_OF_BOOT).value == 0
    vtl0.monitor.lock_policy("vm")
    assert upgrade(vtl0, signed(STRICTER, 1)) == -errno.EPERM


def test_a_policy_that_says_nothing_of_it_cannot_be_upgraded(vtl0: Vtl0) -> None:
    vtl0.lock(POLICY + "modules: {certificate_section: .certificates}\n")
    assert upgrade(vtl0, signed(STRICTER, 1)) == -errno.EPERM
