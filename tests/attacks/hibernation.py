"""Hibernation (ACPI S4) as a transition, and what whoever holds the disk does to it while the machine is off."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vtlab.client.driver import COMMAND_PORT, READY, Driver
from vtlab.client.machine import Machine
from vtlab.client.serial import read_first
from vtlab.client.symbols import Symbols
from vtlab.errors import GuestLost
from vtlab.services import HIBERNATION_HEADER, HIBERNATION_MAGIC, SEALED_STATE_HEADER, SEALED_STATE_MAGIC
from vtlab.v1 import vmm_pb2
from vtlab.x86.registers import Cr4
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.kernels import FORGED_BANNER
from vtlab_attacks.kexec import banner
from vtlab_attacks.resets import GUARDED, say
from vtlab_attacks.state import PAGE, memory, register, show_bytes

TO_DISK = 4
SAVED_CR4 = 16  # in struct hibernated of vtl0_guest/kernels/selfguard/hibernate.c
AWAKE = "selfguard: awake, from the image"
UP, DOWN = re.compile(rf"{AWAKE}|{READY}"), re.compile(r"oops: [^\n]*cpl=0")
OFF = "switched off by ACPI S4"
MARK, EARLIER, LATER = b"before the image", b"of an earlier night", b"behind the image"

SEAN_S4 = "Heki thread (Christopherson 2024): no story for reboot, kexec, hibernate"
OFFLINE = "Linux, Documentation/power/swsusp.rst: whoever changes the image while the machine is off changes the kernel"
LOCKDOWN = "Linux lockdown: hibernation is forbidden, since nobody verifies the image"


# ------------------------------------------------------------------------------------------------------ off and on


def switch_off(machine: Machine) -> None:
    """Has the guest keep its memory on the disk and switch the machine off. Raises TimedOut, WrongState."""
    say(machine, f"sleep {TO_DISK} 0")
    machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=BOOT_TIMEOUT)


def switch_on(machine: Machine) -> str:
    """What the kernel says until it waits for commands again, awake or started anew.

    Raises:
        GuestLost: it broke down while it woke.
    """
    log, answers = machine.serial_reader(0, from_now=True), machine.serial_reader(COMMAND_PORT, from_now=True)
    machine.reset()
    machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING, timeout=BOOT_TIMEOUT)
    came, said = read_first([(log, UP), (log, DOWN)], BOOT_TIMEOUT)
    if came == 1:
        raise GuestLost(f"machine '{machine.name}'", f"its kernel broke down: {said.splitlines()[-1]}")
    if AWAKE in said:
        answers.read_line(BOOT_TIMEOUT)
    return said


def hibernate(guest: Guest) -> tuple[Guest, Evidence]:
    """Complete if the same kernel goes on with what it held before, and nothing but the image was there meanwhile."""
    machine, symbols = guest.machine, guest.symbols
    mailbox = symbols.physical("driver_mailbox")
    guest.driver.write_bytes(symbols["driver_mailbox"], MARK)
    before = _held(machine)
    generation, ticks = machine.info().generation, guest.driver.ticks()
    switch_off(machine)
    off = machine.info().reason
    said = switch_on(machine)
    following = replace(guest, driver=Driver(machine))
    following.driver.sleep(0, 1)  # interrupts come again
    after = _held(machine)
    reached = (
        off == OFF
        and AWAKE in said
        and GUARDED not in said  # its rules come back with it, not by its asking
        and after == before
        and memory(machine, mailbox, len(MARK)) == MARK
        and following.driver.ticks() > ticks
        and machine.info().generation == generation + 1
    )
    shown = [f"{'VTL1' if one[0] else 'no VTL1'} {' '.join(map(hex, one[1:]))}" for one in (before, after)]
    return following, Evidence("VTL1, CR0, CR3, CR4, EFER, GDTR, IDTR, TR", *shown, reached, False)


def _held(machine: Machine) -> tuple[int, ...]:
    """What pins are about, and whether there are any."""
    state = machine.registers()
    registers = state.registers
    tables = state.gdtr.base, state.idtr.base, state.tr.base
    control = registers.cr0, registers.cr3, registers.cr4, registers.efer
    return (int(machine.info().vtl1_enabled), *control, *tables)


# -------------------------------------------------------------------------------------------------------- the image


class Image:
    """What the disk holds, taken out of the machine; put() gives it back."""

    def __init__(self, machine: Machine) -> None:
        """Raises ValueError if there is no image."""
        self._machine = machine
        header = machine.read_disk(0, PAGE)
        magic, count, state_size, *_ = HIBERNATION_HEADER.unpack_from(header)
        if magic != HIBERNATION_MAGIC:
            raise ValueError("no image is on the disk")
        self.count, self.state_size = int(count), int(state_size)
        self._first = 1 + -(-self.count * 8 // PAGE)
        size = (self._first + self.count) * PAGE + self.state_size
        self.data = bytearray(machine.read_disk(0, size))
        self._numbers: tuple[int, ...] = struct.unpack_from(f"<{self.count}Q", self.data, PAGE)

    @property
    def state(self) -> slice:
        """Where VTL1's is."""
        return slice((self._first + self.count) * PAGE, len(self.data))

    def _place(self, gpa: int) -> int:
        place: int = (self._first + self._numbers.index(gpa // PAGE)) * PAGE + gpa % PAGE
        return place

    def read(self, gpa: int, size: int) -> bytes:
        """What will be at an address of one page."""
        at = self._place(gpa)
        return bytes(self.data[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        at = self._place(gpa)
        self.data[at : at + len(data)] = data

    @property
    def digest(self) -> bytes:
        """SHA-256 of page numbers and pages: what VTL1 seals of it."""
        index = self.data[PAGE : PAGE + self.count * 8]
        pages = self.data[self._first * PAGE : self.state.start]
        return sha256(bytes(index + pages)).digest()

    def put(self) -> None:
        self._machine.write_disk(0, bytes(self.data))


def _wake(attempts: Attempts, machine: Machine) -> None:
    """Switches it on; what became of the image is a refusal if VTL1 made one of it."""
    if AWAKE not in switch_on(machine):
        attempts.note(machine.info().reason or "the kernel did not use the image")


# ----------------------------------------------------------------------------------------------------------- attacks


Forge = Callable[[Image, Symbols], object]


def _changed(machine: Machine, forge: Forge, symbols: Symbols, attempts: Attempts) -> None:
    switch_off(machine)
    image = Image(machine)
    forge(image, symbols)
    image.put()
    _wake(attempts, machine)


def other_kernel(forge: Forge) -> Callable[[Machine, Driver, Symbols], Evidence]:
    """Aimed at another banner in the kernel that goes on: its read-only data."""

    def run(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
        return observe(
            "banner of the kernel that runs",
            lambda: banner(machine, symbols),
            lambda attempts: _changed(machine, forge, symbols, attempts),
            symbols,
            lambda _, after: after == FORGED_BANNER,
            show_bytes,
        )

    return run


def forge_banner(image: Image, symbols: Symbols) -> None:
    image.write(symbols.physical("driver_banner"), FORGED_BANNER)


def seal_as_another(image: Image, symbols: Symbols) -> None:
    """All of it as another machine's kernel, and its VTL1, would have written it: whole, but by another key."""
    forge_banner(image, symbols)
    if not image.state_size:
        return
    _, name, number, _ = SEALED_STATE_HEADER.unpack_from(image.data, image.state.start)
    nonce = os.urandom(12)
    header = SEALED_STATE_HEADER.pack(SEALED_STATE_MAGIC, name, number, nonce)
    content = image.digest.ljust(image.state_size - len(header) - 16, b"\0")
    image.data[image.state] = header + AESGCM(AESGCM.generate_key(256)).encrypt(nonce, content, header)


def clear_smep(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """The CR4 that waking loads."""

    def forge(image: Image, symbols: Symbols) -> None:
        place = symbols.physical("hibernated") + SAVED_CR4
        (saved,) = struct.unpack("<Q", image.read(place, 8))
        image.write(place, struct.pack("<Q", saved & ~Cr4.SMEP))

    return observe(
        "CR4.SMEP",
        lambda: int(bool(register(machine, "cr4") & Cr4.SMEP)),
        lambda attempts: _changed(machine, forge, symbols, attempts),
        symbols,
        lambda _, after: not after,
    )


def replay(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The image of an earlier night in place of the last one: what happened since has not happened."""
    mailbox = symbols.physical("driver_mailbox")

    def rolled_back() -> bool:
        return bool(memory(machine, mailbox, len(EARLIER)) == EARLIER)

    def steps(attempts: Attempts) -> None:
        driver.write_bytes(symbols["driver_mailbox"], EARLIER)
        switch_off(machine)
        old = Image(machine)
        _wake(attempts, machine)
        Driver(machine).write_bytes(symbols["driver_mailbox"], LATER)
        switch_off(machine)
        old.put()
        _wake(attempts, machine)

    return observe(
        "memory of an earlier image", rolled_back, steps, symbols, lambda _, after: after, lambda one: str(one).lower()
    )


TRANSITIONS = [
    Transition(
        "hibernate",
        "Keeps its memory on a disk, is switched off and on, and goes on from there",
        "ACPI 6.5, S4; Linux kernel/power/snapshot.c",
        hibernate,
    ),
]
TRANSITION_ATTACKS = [
    Attack(
        "hibernate-changed-image",
        "Changes the kernel in the image while the machine is off",
        OFFLINE,
        other_kernel(forge_banner),
    ),
    Attack(
        "hibernate-foreign-image",
        "Puts another machine's image on the disk, with a state that another VTL1 sealed",
        LOCKDOWN,
        other_kernel(seal_as_another),
    ),
    Attack("hibernate-changed-cr4", "Changes the CR4 that waking restores, in the image", SEAN_S4, clear_smep),
    Attack("hibernate-old-image", "Puts an older image of the same machine on the disk", OFFLINE, replay),
]
