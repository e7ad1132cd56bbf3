"""ACPI tables: checksums, the chain from the root pointer, and what each table says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.loaders.images import Memory
from vtl0_guest.cpu.devices import ioapic, power_management, reset_ports
from vtl0_guest.loaders.acpi import aml, place_tables
from vtl0_guest.loaders.target import FIRMWARE_START, Target
from vtlab.errors import BadImage


class Tables:
    """What a kernel finds from the root pointer on."""

    def __init__(self, vp_count: int = 1) -> None:
        memory = Memory(2 << 20)
        root = place_tables(Target("kernel", 2 << 20, memory.write, vp_count), vp_count)
        self.memory = memory.data
        assert root == FIRMWARE_START
        self.root = bytes(self.memory[root : root + 36])
        old, new = struct.unpack_from("<I", self.root, 16)[0], struct.unpack_from("<Q", self.root, 24)[0]
        self.by_old = self._list(old, "I")
        self.tables = {data[:4]: data for data in map(self.table, self._list(new, "Q"))}

    def table(self, address: int) -> bytes:
        size = struct.unpack_from("<I", self.memory, address + 4)[0]
        data = bytes(self.memory[address : address + size])
        assert sum(data) & 0xFF == 0, data[:4]
        return data

    def _list(self, address: int, kind: str) -> list[int]:
        body = self.table(address)[36:]
        return [entry for (entry,) in struct.iter_unpack("<" + kind, body)]


def test_both_lists_name_the_same_tables() -> None:
    tables = Tables()
    assert tables.root[:8] == b"RSD PTR "
    assert sum(tables.root[:20]) & 0xFF == sum(tables.root) & 0xFF == 0
    assert set(tables.tables) == {b"FACP", b"APIC"}
    assert [tables.table(address) for address in tables.by_old] == list(tables.tables.values())


def test_the_fadt_names_registers_that_exist() -> None:
    tables = Tables()
    fadt = tables.tables[b"FACP"]
    assert (len(fadt), fadt[8]) == (244, 4)
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert tables.memory[facs : facs + 4] == b"FACS"
    assert tables.table(dsdt)[:4] == b"DSDT"
    assert struct.unpack_from("<H", fadt, 46)[0] == power_management.SCI_IRQ
    assert struct.unpack_from("<I", fadt, 48)[0] == 0, "always in ACPI mode"
    event, _, control, _, _, timer = struct.unpack_from("<6I", fadt, 56)
    assert {event, control, timer} <= set(power_management.PORTS)
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, reset_ports.RESET_CONTROL)
    assert fadt[128] & 4, "a value that resets"
    for offset, port in ((148, event), (172, control), (208, timer)):
        assert struct.unpack_from("<Q", fadt, offset + 4)[0] == port


@pytest.mark.parametrize("vp_count", [1, 2, 64])
def test_the_madt_lists_processors_and_inputs(vp_count: int) -> None:
    body = Tables(vp_count).tables[b"APIC"][44:]
    entries: list[bytes] = []
    while body:
        entries.append(body[: body[1]])
        body = body[body[1] :]
    processors = [entry for entry in entries if entry[0] == 0]
    assert [(entry[2], entry[3], entry[4]) for entry in processors] == [(n, n, 1) for n in range(vp_count)]
    assert [struct.unpack_from("<I", entry, 4)[0] for entry in entries if entry[0] == 1] == [ioapic.BASE]
    overrides = {entry[3]: struct.unpack_from("<IH", entry, 4) for entry in entries if entry[0] == 2}
    assert overrides == {0: (ioapic.TIMER_INPUT, 0), power_management.SCI_IRQ: (power_management.SCI_IRQ, 0xD)}


def test_an_image_there_is_refused() -> None:
    memory = Memory(2 << 20)
    target = Target("kernel", 2 << 20, memory.write)
    target.put(0xF0100, b"code", "segment 0")
    with pytest.raises(BadImage, match="ACPI tables"):
        place_tables(target, 1)


# ------------------------------------------------------------------------------------------------------------- AML


def test_terms_as_the_specification_encodes_them() -> None:
    assert aml.name("\\_S5", aml.package(aml.integer(5), aml.integer(0))) == bytes.fromhex(
        "08 5c 5f53355f 12 05 02 0a05 00"
    )
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c 41d00501")
    assert aml.resources(aml.io_ports(0x3F8, 8), aml.irq(4)) == bytes.fromhex("11 10 0a0d 4701f803f8030108 221000 7900")
    assert aml.name_string("_SB.COM1") == b"\x2e_SB_COM1"
    for bad in ("", "com1", "A.B.C", "ABCDE", "1ABC"):
        with pytest.raises(ValueError, match="ACPI name"):
            aml.name_string(bad)


@given(st.integers(0, (1 << 64) - 1))
def test_integers_are_shortest_and_whole(value: int) -> None:
    data = aml.integer(value)
    sizes = {0x00: 0, 0x01: 0, 0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}
    assert len(data) == 1 + sizes[data[0]]
    assert int.from_bytes(data[1:], "little") == (value if len(data) > 1 else 0)
    assert len(data) > 1 or data[0] == value


@given(st.integers(0, 1 << 17))
def test_package_lengths_count_themselves(size: int) -> None:
    term = aml.scope("_SB", bytes(size))
    lead = term[1]
    extra = lead >> 6
    length = lead & 0x3F if not extra else lead & 15 | int.from_bytes(term[2 : 2 + extra], "little") << 4
    assert length == len(term) - 1
