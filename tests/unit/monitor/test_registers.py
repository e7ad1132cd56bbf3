"""Registers after lock: intercepts, the service that writes CR0 and CR4, re-authentication, rules in code."""

from __future__ import annotations

import errno

import dill
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import CR0, CR4, Vtl0
from vmm.launcher import _ship
from vtl1_monitor import api
from vtl1_monitor.judge import Verdict
from vtlab.errors import BadArgument
from vtlab.ram import RamFile
from vtlab.services import AUTHENTICATE_CONTEXT, AUTHENTICATE_REQUEST, NONCE_SIZE, Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4

KEY = Ed25519PrivateKey.generate()
EKEYREJECTED = 129


@pytest.fixture
def policy() -> str:
    key = KEY.public_key().public_bytes_raw().hex()
    return POLICY + f"actions:\n  debug: {{public_key: '{key}', allows: [LSTAR, cr4], services: [LOAD_KDATA]}}\n"


def write_msr(vtl0: Vtl0, index: int = 0xC0000082, origin: int = vcpu_pb2.ORIGIN_VCPU) -> vcpu_pb2.VtlReturn:
    exit_ = vcpu_pb2.Exit(
        origin=vcpu_pb2.Origin.ValueType(origin),
        msr=vcpu_pb2.MsrAccess(index=index, write=True, old_value=1, new_value=2),
    )
    client = origin == vcpu_pb2.ORIGIN_CLIENT
    reason = vcpu_pb2.ENTER_REASON_CLIENT_WRITE if client else vcpu_pb2.ENTER_REASON_INTERCEPT
    return vtl0.enter(reason, intercept=exit_).vtl_return


@pytest.mark.parametrize(
    ("number", "value", "result", "written"),
    [
        (0, CR0 | Cr0.TS, 0, True),
        (0, CR0 & ~Cr0.WP, errno.EACCES, False),
        (4, CR4 | Cr4.PGE, 0, True),
        (4, CR4 & ~Cr4.SMEP, errno.EACCES, False),
        (4, CR4 | Cr4.VMXE, errno.EACCES, False),
        (4, (CR4 | Cr4.PGE) & ~Cr4.UMIP, errno.EACCES, False),
        (0, CR0 & ~Cr0.PG, errno.EINVAL, False),
        (0, CR0 | Cr0.NW, errno.EINVAL, False),
        (0, CR0 | 1 << 40, errno.EINVAL, False),
        (4, CR4 & ~Cr4.PAE, errno.EINVAL, False),
        (4, CR4 ^ Cr4.LA57, errno.EINVAL, False),
        (4, CR4 | 1 << 30, errno.EINVAL, False),
        (3, image.PML4, errno.EINVAL, False),
        (8, 0, errno.EINVAL, False),
    ],
)
def test_write_control_register(locked: Vtl0, number: int, value: int, result: int, written: bool) -> None:
    call = locked.call(Service.WRITE_CONTROL_REGISTER, number, int(value))
    assert call.value == -result, locked.log()
    name = {0: registers_pb2.REGISTER_NAME_CR0, 4: registers_pb2.REGISTER_NAME_CR4}.get(number)
    writes = [(u.register.name, u.register.value) for u in call.returned.updates if u.register.name == name]
    assert writes == ([(name, value)] if written else [])


def test_an_intercepted_write_is_judged_and_recorded(locked: Vtl0) -> None:
    returned = write_msr(locked)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    row = locked.machine.verdicts.kept()[-1]
    assert (row.rule, row.resolution, row.exit.msr.index) == ("LSTAR", returned.resolution, 0xC0000082)
    assert row.time.seconds > 0


def test_the_violation_of_memory_rules(locked: Vtl0) -> None:
    def fault(gpa: int, access: int = vcpu_pb2.ACCESS_KIND_WRITE) -> int:
        memory_fault = vcpu_pb2.MemoryFault(gpa=gpa, access=vcpu_pb2.AccessKind.ValueType(access))
        return locked.intercept(memory_fault=memory_fault).resolution.action

    assert fault(image.TEXT) == vcpu_pb2.ACTION_DENY
    assert fault(image.RODATA) == vcpu_pb2.ACTION_HALT
    assert fault(image.VTL1, vcpu_pb2.ACCESS_KIND_READ) == vcpu_pb2.ACTION_DENY
    assert fault(image.KERNEL_PT) == vcpu_pb2.ACTION_DENY
    assert [row.rule for row in locked.machine.verdicts.kept()[-4:]] == ["text", "rodata", "vtl1", "page_tables"]


def test_log_opens_the_page(vtl0: Vtl0) -> None:
    vtl0.lock(POLICY.replace("rodata: halt", "rodata: log"))
    fault = vcpu_pb2.MemoryFault(gpa=image.RODATA + 8, access=vcpu_pb2.ACCESS_KIND_WRITE)
    returned = vtl0.intercept(memory_fault=fault)
    assert returned.resolution.action == vcpu_pb2.ACTION_RETRY
    assert returned.stop_all
    assert vtl0.rights(image.RODATA) == "rw"
    assert vtl0.file(image.RODATA) is RamFile.WRITABLE
    assert vtl0.read(image.RODATA, 4) == bytes(range(4))


# ----------------------------------------------------------------------------------------------- authentication


def challenge(vtl0: Vtl0) -> bytes:
    assert vtl0.call(Service.CHALLENGE, image.FREE).value == 0, vtl0.log()
    return vtl0.read(image.FREE, NONCE_SIZE)


def authenticate(vtl0: Vtl0, nonce: bytes, name: bytes = b"debug", key: Ed25519PrivateKey = KEY) -> int:
    padded = name.ljust(32, b"\0")
    vtl0.write(image.FREE, AUTHENTICATE_REQUEST.pack(padded, key.sign(AUTHENTICATE_CONTEXT + nonce + padded)))
    return vtl0.call(Service.AUTHENTICATE, image.FREE, AUTHENTICATE_REQUEST.size).value


def test_an_action_is_granted_once(locked: Vtl0) -> None:
    assert authenticate(locked, challenge(locked)) == 0
    assert write_msr(locked).resolution.action == vcpu_pb2.ACTION_COMMIT
    assert write_msr(locked).resolution.action == vcpu_pb2.ACTION_DENY


def test_a_grant_is_for_its_rules_only(locked: Vtl0) -> None:
    assert authenticate(locked, challenge(locked)) == 0
    assert write_msr(locked, 0x176).resolution.action == vcpu_pb2.ACTION_DENY
    assert write_msr(locked, origin=vcpu_pb2.ORIGIN_CLIENT).resolution.action == vcpu_pb2.ACTION_DENY
    assert locked.call(Service.TAKE_POLICY, image.FREE, 1).value == -errno.EPERM
    assert locked.call(Service.PROTECT_MEMORY, image.FREE, 1).value == -errno.EPERM
    assert locked.call(Service.WRITE_CONTROL_REGISTER, 4, int(CR4 & ~Cr4.SMEP)).value == 0
    assert locked.call(Service.WRITE_CONTROL_REGISTER, 4, int(CR4 & ~Cr4.SMEP)).value == -errno.EACCES


def test_a_grant_can_open_a_boot_only_service_once(locked: Vtl0) -> None:
    assert authenticate(locked, challenge(locked)) == 0
    pa, count = locked.ranges([(0, image.PATCHES, image.PATCHES + 72, 5)])
    assert locked.call(Service.LOAD_KDATA, pa, count).value == 0
    assert locked.call(Service.LOAD_KDATA, pa, count).value == -errno.EPERM


def test_proofs_that_do_not_hold(locked: Vtl0) -> None:
    nonce = challenge(locked)
    assert authenticate(locked, nonce, key=Ed25519PrivateKey.generate()) == -EKEYREJECTED
    assert authenticate(locked, nonce) == -errno.EPERM, "a nonce is void after one attempt"
    older = challenge(locked)
    newer = challenge(locked)
    assert older != newer
    assert authenticate(locked, older) == -EKEYREJECTED
    assert authenticate(locked, challenge(locked), b"other") == -errno.ENOENT
    assert authenticate(locked, challenge(locked)) == 0
    assert authenticate(locked, newer) == -errno.EPERM
    assert locked.call(Service.AUTHENTICATE, image.FREE, 64).value == -errno.EINVAL


def test_the_nonce_is_written_only_where_vtl0_could(locked: Vtl0) -> None:
    """VTL1 as the confused deputy: its own memory, sealed memory, no memory."""
    before = {file: bytes(view) for file, view in locked.ram.views.items() if file is not RamFile.PRIVATE}
    for pa in (image.VTL1, image.TEXT, image.TEXT - 16, image.KERNEL_PT, image.RAM_SIZE - 8, 1 << 62):
        assert locked.call(Service.CHALLENGE, pa).value == -errno.EFAULT, hex(pa)
    assert {file: bytes(view) for file, view in locked.ram.views.items() if file is not RamFile.PRIVATE} == before


def test_the_open_nonce_is_in_vtl1s_memory(locked: Vtl0) -> None:
    nonce = challenge(locked)
    assert nonce in locked.ram.views[RamFile.PRIVATE][image.VTL1 : image.VTL1 + 2 * image.PAGE]


# ----------------------------------------------------------------------------------------------- rules in code


class Watcher(api.CodeRule):
    """Answers what it was told to, and counts."""

    name = "watcher"

    def __init__(self, answer: vcpu_pb2.Resolution | None, may_relax: bool = False) -> None:
        self.answer = answer
        self.may_relax = may_relax
        self.seen: list[str] = []

    def filter(self) -> vcpu_pb2.InterceptFilter:
        return vcpu_pb2.InterceptFilter(hlt=True, msr_writes=[vcpu_pb2.MsrFilter(index=0x10, mask=1)])

    def judge(self, exit_: vcpu_pb2.Exit, verdict: Verdict, machine: api.Machine) -> vcpu_pb2.Resolution | None:
        self.seen.append(verdict.rule)
        return self.answer


class Raiser(api.CodeRule):
    name = "raiser"

    def judge(self, exit_: vcpu_pb2.Exit, verdict: Verdict, machine: api.Machine) -> vcpu_pb2.Resolution | None:
        raise ZeroDivisionError("oops")


@pytest.mark.parametrize(
    ("rules_in_code", "pinned", "free"),
    [
        ((Watcher(None),), vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_COMMIT),
        ((Watcher(api.commit()),), vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_COMMIT),
        ((Watcher(api.commit(), may_relax=True),), vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_COMMIT),
        ((Watcher(api.halt()),), vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_HALT),
        ((Watcher(api.skip()),), vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_SKIP),
        ((Watcher(vcpu_pb2.Resolution()),), vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_DENY),
        ((Raiser(),), vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_DENY),
    ],
    ids=["silent", "commit", "may relax", "halt", "skip", "zero", "raises"],
)
def test_code_may_refuse_more_and_relax_only_if_it_says_so(vtl0: Vtl0, pinned: int, free: int) -> None:
    vtl0.lock(POLICY)
    assert write_msr(vtl0).resolution.action == pinned
    assert write_msr(vtl0, 0x12345).resolution.action == free


@pytest.mark.parametrize("rules_in_code", [(Watcher(None),)])
def test_code_adds_to_the_filter_and_each_machine_has_its_copy(vtl0: Vtl0, rules_in_code: tuple[Watcher, ...]) -> None:
    assert vtl0.take_policy(POLICY).value == 0
    updates = vtl0.call(Service.LOCK_REGS).returned.updates
    (filter_,) = [update.intercepts for update in updates if update.HasField("intercepts")]
    assert filter_.hlt
    assert 0x10 in [row.index for row in filter_.msr_writes]
    write_msr(vtl0)
    assert vtl0.machine.code_rules[0].seen == ["LSTAR"]  # type: ignore[attr-defined]
    assert rules_in_code[0].seen == []


def test_what_is_shipped_must_be_rules() -> None:
    assert api.load_rules(None) == ()
    rule = Raiser()
    assert api.load_rules(rule) == api.load_rules([rule]) == (rule,)
    with pytest.raises(BadArgument, match="rules: int is not"):
        api.load_rules([1])


RULE_OF_A_SCRIPT = """
from vmm.launcher import _ship
from vtl1_monitor import api
from vtlab.v1 import vcpu_pb2

class Shipped(api.CodeRule):
    name = "shipped"

    def filter(self):
        return vcpu_pb2.InterceptFilter(hlt=True)

    def judge(self, exit_, verdict, machine):
        return api.deny("by code")
"""


def test_a_rule_of_a_script_travels_with_what_it_uses() -> None:
    """A class of __main__ goes by value; the modules that it uses go by name, generated messages included."""
    script: dict[str, object] = {"__name__": "__main__"}
    exec(RULE_OF_A_SCRIPT, script)
    shipped = _ship([script["Shipped"]()])  # type: ignore[operator]
    (rule,) = api.load_rules(dill.loads(shipped))
    assert type(rule) is not script["Shipped"]
    assert rule.filter().hlt
    verdict = Verdict(api.commit(), "")
    assert api.apply([rule], vcpu_pb2.Exit(), verdict, None).rule == "shipped"  # type: ignore[arg-type]
