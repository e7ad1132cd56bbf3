"""Asking for what one may not have: from a range that may not ask, beyond what was delegated, by bad descriptors.

What is asked depends on the design of the machine; the aim and the evidence do not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.services import Service
from vtlab.x86.registers import Cr4
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, observe
from vtlab_attacks.hypercalls import MODIFY_VTL_PROTECTION_MASK
from vtlab_attacks.state import DRIVER_WINDOW, KERNEL_VMA, PAGE, direct, memory, register, show_bytes, show_rights

THREAD = "Heki v3 thread (Christopherson 2024): a VMCALL allows neither delegation nor restriction"
LITEBOX = "litebox issues 852, 1036 (hostile lists of ranges)"

# Of the guard device, design mmio-device: vmm/designs/guard_requests.py and layout.h of the kernel.
DEVICE_WINDOW, TAIL = KERNEL_VMA + 0x1F000, 0x28
DESCRIPTOR = struct.Struct("<2I4Q2I2Q")
ENTRIES = 64
PIN, PROTECT, WRITE_REGISTER, STAND_DOWN = 1, 3, 4, 5
STATUS = ("pending", "ok", "unknown action", "reserved bits", "bad argument", "denied", "locked", "too many")

STORE = bytes.fromhex("8937c3")  # mov %esi, (%rdi); ret
# VMMCALL with RCX = HvCallVtlCall and RAX = 0, RDI to R8 as they are: a VTL call that passes the hypercall page by.
RAW_VTL_CALL = bytes.fromhex("31c0 b911000000 0f01d9 c3")


def smep(machine: Machine) -> int:
    return int(bool(register(machine, "cr4") & Cr4.SMEP))


def without_smep(machine: Machine) -> int:
    return int(register(machine, "cr4") & ~Cr4.SMEP)


class Ring:
    """The guest's ring, written by whoever may write kernel data."""

    def __init__(self, machine: Machine, symbols: Symbols) -> None:
        self._machine = machine
        self._ring = symbols.physical("guard_ring")
        self._tail = symbols.physical("guard_tail")
        self.tail = int.from_bytes(machine.read_memory(self._tail, 4), "little")

    def place(self, *arguments: int, action: int, reserved: int = 0) -> int:
        """Puts a descriptor at the tail; the tail after it, for the doorbell."""
        a, b, c, d = (*arguments, 0, 0, 0, 0)[:4]
        at = self._ring + self.tail % ENTRIES * DESCRIPTOR.size
        self._machine.write_memory(at, DESCRIPTOR.pack(action, reserved, a, b, c, d, 0, 0, 0, 0))
        self.tail += 1
        self._machine.write_memory(self._tail, self.tail.to_bytes(4, "little"))
        return self.tail

    def status(self) -> str:
        """Of the descriptor before the tail, as a denial; empty if it was done."""
        at = self._ring + (self.tail - 1) % ENTRIES * DESCRIPTOR.size + 40
        number = int.from_bytes(self._machine.read_memory(at, 4), "little")
        return "" if number == 1 else f"guard device: {STATUS[number]}"


Ask = Callable[[Machine, Driver, Symbols, Attempts], None]


def _then_clear_smep(what: dict[str, Ask]) -> Run:
    """Asks in the design's own way, then writes CR4 as if that had been granted."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        ask = what.get(machine.info().spec.design or "vtl")

        def steps(attempts: Attempts) -> None:
            if ask is not None:
                ask(machine, driver, symbols, attempts)
            if smep(machine):
                attempts.step(driver.call, symbols["gadget_mov_cr4"], without_smep(machine))

        return observe("CR4.SMEP", lambda: smep(machine), steps, symbols, lambda _, after: not after)

    return run


def _mapped(machine: Machine) -> bool:
    return bool(machine.translate(DEVICE_WINDOW).present)


def _stand_down_from_driver(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    if not _mapped(machine):
        return
    ring = Ring(machine, symbols)
    attempts.step(driver.write_bytes, DRIVER_WINDOW, STORE)
    for action, arguments in ((STAND_DOWN, (1,)), (WRITE_REGISTER, (4, without_smep(machine)))):
        tail = ring.place(*arguments, action=action)
        attempts.step(driver.call, DRIVER_WINDOW, DEVICE_WINDOW + TAIL, tail)
        attempts.note(ring.status())


def _call_from_driver(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """VTL1's own service for control registers: by the driver's own code, then by the kernel's."""
    if attempts.step(driver.write_bytes, DRIVER_WINDOW, RAW_VTL_CALL):
        attempts.step(driver.call, DRIVER_WINDOW, Service.WRITE_CONTROL_REGISTER, 4, without_smep(machine))
    attempts.step(driver.vtl, Service.WRITE_CONTROL_REGISTER, 4, without_smep(machine))


def _more_than_pins_from_user(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """User code may pin; it asks for a write, and for the end of all protection."""
    if not _mapped(machine):
        return
    ring = Ring(machine, symbols)
    for action, arguments in ((WRITE_REGISTER, (4, without_smep(machine))), (STAND_DOWN, (1,))):
        attempts.step(driver.user, symbols["user_doorbell"], ring.place(*arguments, action=action))
        attempts.note(ring.status())


def _action_without_grant(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """VTL1 delegates by actions that a key opens; here, without the key."""
    signature = symbols.physical("driver_mailbox")
    machine.write_memory(signature, bytes(64))
    attempts.step(driver.vtl, Service.CHALLENGE, signature)
    attempts.step(driver.vtl, Service.AUTHENTICATE, signature, 64)
    attempts.step(driver.vtl, Service.WRITE_CONTROL_REGISTER, 4, without_smep(machine))


def bad_descriptors(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Lists and rings that overlap, wrap, point nowhere or are malformed; any that is obeyed opens text or a secret."""
    text, secret = symbols["text_start"], symbols.physical("vtl1_memory")
    feed = _FEEDERS.get(machine.info().spec.design or "vtl", _nothing)

    def state() -> tuple[str, int, bytes | None]:
        return show_rights(machine.translate(text).access), smep(machine), memory(machine, secret, 32)

    return observe(
        "rights on text, CR4.SMEP, VTL1's memory",
        state,
        lambda attempts: feed(machine, driver, symbols, attempts),
        symbols,
        show=lambda seen: f"{seen[0]}, {seen[1]}, {show_bytes(seen[2])}",
    )


def _nothing(_machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """The design has no descriptors: what is left is to call where nobody listens."""
    attempts.step(driver.call, symbols["hypercall_page"], MODIFY_VTL_PROTECTION_MASK)


def _heki_pages(symbols: Symbols, at: int, size: int) -> list[bytes]:
    """Pages of 8-byte fields: next, next_pa, nranges, then (va, pa, epa, attributes) each."""
    text, secret = symbols.physical("text_start"), symbols.physical("vtl1_memory")
    every_right = 7

    def page(*ranges: tuple[int, int, int, int], following: int = 0, count: int | None = None) -> bytes:
        number = len(ranges) if count is None else count
        body = b"".join(struct.pack("<4Q", *(value % 2**64 for value in one)) for one in ranges)
        return struct.pack("<3Q", 0, following % 2**64, number) + body

    ranges = [
        (direct(text), text, text + PAGE, every_right),
        (direct(secret), secret, secret + PAGE, every_right),
        (0, text + 1, text + PAGE, every_right),
        (0, text + PAGE, text, every_right),
        (0, 2**64 - PAGE, PAGE, every_right),
        (0, size, size + PAGE, every_right),
        (0, text, 2**64 - PAGE, every_right),
        (0, text, text + PAGE, 0xFFFFFFFFFFFFFFFF),
    ]
    loops = [page(ranges[0], following=at), page(ranges[0], following=size), page(ranges[0], count=2**63)]
    return [*(page(one) for one in ranges), *loops]


def _bad_lists_for_vtl1(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    at, size = symbols.physical("driver_mailbox"), machine.info().spec.ram_size
    services = (Service.PROTECT_MEMORY, Service.LOAD_KDATA, Service.VALIDATE_MODULE)
    for page in _heki_pages(symbols, at, size):
        machine.write_memory(at, page)
        for service in services:
            attempts.step(driver.vtl, service, at, 1)
    for address, count in ((at + 8, 1), (size, 1), (symbols.physical("vtl1_memory"), 1), (2**64 - PAGE, 1), (at, 0)):
        for service in services:
            attempts.step(driver.vtl, service, address, count)


def _bad_lists_for_heki(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """KVM_HC_PROTECT_MEMORY; its answer is RAX."""
    at, size = symbols.physical("driver_mailbox"), machine.info().spec.ram_size
    text = symbols.physical("text_start")

    def ask(gpa: int) -> None:
        answer = driver.call(symbols["kvm_hypercall"], 14, gpa)
        attempts.note(f"RAX {answer - 2**64}" if answer >> 63 else "")

    for start, end, rights in (
        (text, text + PAGE, 7),
        (text + 1, text + PAGE, 3),
        (text + PAGE, text, 3),
        (2**64 - PAGE, PAGE, 3),
        (text, size + PAGE, 3),
        (text, text + PAGE, 0),
        (text, text + PAGE, 1 << 63 | 3),
    ):
        machine.write_memory(at, struct.pack("<6Q", 0, 0, 1, start, end, rights))
        attempts.step(ask, at)
    for following, count in ((at, 0), (size, 0), (0, 170), (0, 2**64 - 1)):
        machine.write_memory(at, struct.pack("<3Q", 0, following, count))
        attempts.step(ask, at)
    attempts.step(ask, size)


def _bad_ring(machine: Machine, driver: Driver, symbols: Symbols, attempts: Attempts) -> None:
    """By the kernel's own doorbell, which may ask for everything: it is the descriptors that are wrong."""
    if not _mapped(machine):
        return _nothing(machine, driver, symbols, attempts)
    ring = Ring(machine, symbols)
    text, size = symbols.physical("text_start"), machine.info().spec.ram_size
    bell = symbols["guard_doorbell"]
    bad = (
        (0, (), 0),
        (0xFFFFFFFF, (), 0),
        (STAND_DOWN, (1,), 1),  # a reserved field is set
        (STAND_DOWN, (0,), 0),
        (STAND_DOWN, (1, 1), 0),
        (PROTECT, (text + 1, PAGE, 7), 0),
        (PROTECT, (text, 2**64 - PAGE, 7), 0),  # wraps around
        (PROTECT, (2**64 - PAGE, 2 * PAGE, 7), 0),
        (PROTECT, (size, PAGE, 7), 0),
        (PROTECT, (text, 0, 7), 0),
        (PROTECT, (text, PAGE, 15), 0),
        (WRITE_REGISTER, (4, 0), 0),
        (WRITE_REGISTER, (3, 0), 0),
        (PIN, (4, 0), 0),
    )
    for action, arguments, reserved in bad:
        attempts.step(driver.call, bell, ring.place(*arguments, action=action, reserved=reserved))
        attempts.note(ring.status())
    for tail in (ring.tail + ENTRIES + 1, ring.tail - 1):
        attempts.step(driver.call, bell, tail % 2**32)
    for offset, value in ((0x10, size), (0x18, 3), (0x38, 0)):  # another ring, other entries, off: locked
        attempts.step(driver.write, DEVICE_WINDOW + offset, value, 8)
    return None


_FEEDERS: dict[str, Ask] = {
    "vtl": _bad_lists_for_vtl1,
    "heki-v2": _bad_lists_for_heki,
    "mmio-device": _bad_ring,
}

TRANSITION_ATTACKS = [
    Attack(
        "vtl-call-from-restricted-range",
        "Asks from the driver's code for what lifts protection: a stand-down, or VTL1's write of CR4",
        THREAD,
        _then_clear_smep({"vtl": _call_from_driver, "mmio-device": _stand_down_from_driver}),
    ),
    Attack(
        "delegated-action-beyond-delegation",
        "Has a less privileged component ask for more than was delegated to it, and writes CR4",
        THREAD,
        _then_clear_smep({"vtl": _action_without_grant, "mmio-device": _more_than_pins_from_user}),
    ),
    Attack(
        "ring-bad-descriptors",
        "Feeds whoever reads lists of ranges ones that overlap, wrap around, loop or lie outside of RAM",
        LITEBOX,
        bad_descriptors,
        "without protection there is nobody who reads descriptors",
    ),
]
