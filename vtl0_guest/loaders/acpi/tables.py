"""The ACPI tables of a machine: what firmware would tell a kernel about processors, interrupts, reset and power.

Source: ACPI 6.5, chapter 5 ("ACPI software programming model"). There is no PCI, no embedded controller, no general-
purpose event; the fixed hardware is that of devices/power_management.py and is always in ACPI mode (SMI_CMD is zero).
"""

from __future__ import annotations

import struct

from vtl0_guest.cpu.devices import ioapic, keyboard_controller, local_apic, power_management, reset_ports, rtc, serial
from vtl0_guest.loaders.acpi import aml

_OEM, _TABLE, _CREATOR = b"VTLAB ", b"VTLABPC ", b"VTLB"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
FACS_SIZE = 64

# FADT flags (table 5.10): WBINVD works, C1 on all processors, no fixed power and sleep buttons, no wake-up event of the
# clock, reset register.
_WBINVD, _PROC_C1, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _NO_CLOCK, _RESET = 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6, 1 << 10
_FADT_FLAGS = _WBINVD | _PROC_C1 | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _NO_CLOCK | _RESET
# IA-PC boot architecture (table 5.11): legacy devices, an 8042, no VGA, no MSI.
_BOOT_ARCHITECTURE = 0x1 | 0x2 | 0x4 | 0x8
# Longer than ACPI takes for a state that can be used: there is no C2 and no C3.
_NO_C2, _NO_C3 = 0xFFFF, 0xFFFF
_NO_GAS = bytes(12)

# MADT (5.2.12): the machine has two 8259; flags of an interrupt: polarity 1:0, trigger 3:2.
_PCAT_COMPATIBLE = 1
_ACTIVE_HIGH_LEVEL = 0x0D
_ALL_PROCESSORS = 0xFF


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero, where it is zero now."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A header with length and checksum, and the body."""
    size = _HEADER.size + len(body)
    header = _HEADER.pack(signature, size, revision, 0, _OEM, _TABLE, 1, _CREATOR, 1)
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(rsdt_address: int, xsdt_address: int) -> bytes:
    """Root pointer, revision 2: one checksum over the first 20 bytes, one over all 36."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, rsdt_address, 36, xsdt_address, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def rsdt(addresses: list[int]) -> bytes:
    """Tables by 32-bit addresses."""
    return table(b"RSDT", 1, struct.pack(f"<{len(addresses)}I", *addresses))


def xsdt(addresses: list[int]) -> bytes:
    """Tables by 64-bit addresses."""
    return table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def facs() -> bytes:
    """Firmware control structure, which has no checksum; it must lie on a 64-byte boundary."""
    return struct.pack("<4sIIIIIQB", b"FACS", FACS_SIZE, 0, 0, 0, 0, 0, 2).ljust(FACS_SIZE, b"\0")


def _port(port: int, size: int) -> bytes:
    """Generic address structure of an I/O register of `size` bytes."""
    return struct.pack("<BBBBQ", 1, 8 * size, 0, {1: 1, 2: 2, 4: 3}[size], port)


def fadt(facs_address: int, dsdt_address: int) -> bytes:
    """Fixed description table, revision 4."""
    power = power_management
    old = struct.pack(
        "<IIBBHIBBBB8I8BHHHHBBBBBHBI",
        *(facs_address, dsdt_address, 0, 0, power.SCI_IRQ),
        *(0, 0, 0, 0, 0),  # SMI command port and its values
        *(power.EVENT_BLOCK, 0, power.CONTROL_BLOCK, 0, 0, power.TIMER_BLOCK, 0, 0),
        *(power.EVENT_SIZE, power.CONTROL_SIZE, 0, power.TIMER_SIZE, 0, 0, 0, 0),
        *(_NO_C2, _NO_C3, 0, 0, 0, 0),
        *(0, 0, rtc.CENTURY, _BOOT_ARCHITECTURE, 0, _FADT_FLAGS),
    )
    reset = _port(reset_ports.RESET_CONTROL, 1) + bytes([reset_ports.FULL_RESET]) + bytes(3)
    registers = [
        _port(power.EVENT_BLOCK, power.EVENT_SIZE),
        _NO_GAS,
        _port(power.CONTROL_BLOCK, power.CONTROL_SIZE),
        _NO_GAS,
        _NO_GAS,
        _port(power.TIMER_BLOCK, power.TIMER_SIZE),
        _NO_GAS,
        _NO_GAS,
    ]
    # The FACS and the DSDT lie below 4 GiB: their 64-bit fields stay zero, where ACPI wants one of each pair.
    return table(b"FACP", 4, old + reset + bytes(16) + b"".join(registers))


def madt(vp_count: int) -> bytes:
    """Interrupt controllers: a local APIC for each vCPU, the IOAPIC, the two ISA interrupts that are special, NMI."""
    entries = [struct.pack("<BBBBI", 0, 8, index, index, 1) for index in range(vp_count)]
    entries += [
        struct.pack("<BBBBII", 1, 12, ioapic.ID, 0, ioapic.BASE, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, ioapic.TIMER_INPUT, 0),
        struct.pack("<BBBBIH", 2, 10, 0, power_management.SCI_IRQ, power_management.SCI_IRQ, _ACTIVE_HIGH_LEVEL),
        struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, 0, 1),
    ]
    return table(b"APIC", 3, struct.pack("<II", local_apic.DEFAULT_BASE, _PCAT_COMPATIBLE) + b"".join(entries))


def _isa(name: str, pnp: str, unique: int, *descriptors: bytes) -> bytes:
    return aml.device(
        name,
        aml.name("_HID", aml.eisa_id(pnp)),
        aml.name("_UID", aml.integer(unique)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )


def dsdt(vp_count: int) -> bytes:
    """Processors, the ISA devices, and the sleep types of S3, S4 and S5, the only sleeping states."""
    processors = [
        aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))
        for index in range(vp_count)
    ]
    ports = [
        _isa(f"COM{number}", "PNP0501", number, aml.io_ports(base, 8), aml.irq(irq))
        for number, (base, irq) in enumerate(serial.PORTS, 1)
    ]
    clock = _isa("RTC", "PNP0B00", 0, aml.io_ports(rtc.INDEX, 2), aml.irq(rtc.IRQ))
    keyboard = _isa(
        "KBD",
        "PNP0303",
        0,
        aml.io_ports(keyboard_controller.DATA, 1),
        aml.io_ports(keyboard_controller.COMMAND, 1),
        aml.irq(keyboard_controller.IRQ),
    )
    states = {
        "\\_S3": power_management.SLEEP_TYPE_RAM,
        "\\_S4": power_management.SLEEP_TYPE_DISK,
        "\\_S5": power_management.SLEEP_TYPE_OFF,
    }
    sleep = b"".join(
        aml.name(path, aml.package(aml.integer(kind), aml.integer(kind), aml.integer(0), aml.integer(0)))
        for path, kind in states.items()
    )
    return table(b"DSDT", 2, sleep + aml.scope("\\_SB", *processors, *ports, clock, keyboard))
