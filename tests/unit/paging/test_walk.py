"""The walker against a second formulation of the manual's rules, and against hand-made cases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtlab.v1 import vcpu_pb2
from vtlab.x86 import paging
from vtlab.x86.registers import Cr0, Cr4, Efer

READ = vcpu_pb2.ACCESS_KIND_READ
WRITE = vcpu_pb2.ACCESS_KIND_WRITE
EXECUTE = vcpu_pb2.ACCESS_KIND_EXECUTE
NX = 1 << 63

# Registers of each mode.
MODES = {
    "32": (Cr0.PG | Cr0.PE, 0, 0),
    "pae": (Cr0.PG | Cr0.PE, Cr4.PAE, 0),
    "long": (Cr0.PG | Cr0.PE, Cr4.PAE, Efer.LMA),
}


def bits(value: int, high: int, low: int) -> int:
    return (value >> low) & ((1 << (high - low + 1)) - 1)


PIECES = {"32": [22, 12], "pae": [30, 21, 12], "long": [39, 30, 21, 12]}
# Levels at which bit 7 maps a page.
BIG = {("32", 22), ("pae", 21), ("long", 21), ("long", 30)}


def must_be_zero(mode: str, shift: int, big: bool, nxe: bool, width: int) -> list[tuple[int, int]]:
    """(high, low) fields of an entry that are reserved."""
    if mode == "32":
        if not big:
            return []
        return [(21, 21)] + ([(20, 20 - (39 - max(width, 32)))] if width < 40 else [])
    fields = [(51, width)] + ([] if nxe else [(63, 63)])
    if mode == "pae":
        fields += [(62, 52)] + ([(2, 1), (8, 5), (63, 63)] if shift == 30 else [])
    elif shift == 39:
        fields += [(7, 7)]
    return fields + ([(shift - 1, 13)] if big else [])


def permitted(
    access: int, user: bool, user_page: bool, writable: bool, xd: bool, cr0: int, cr4: int, exempt: bool
) -> bool:
    """Section 4.6.1 as a table. `exempt`: an explicit access with RFLAGS.AC."""
    kernel_write = writable or not bool(cr0 & Cr0.WP)
    smap = not bool(cr4 & Cr4.SMAP) or exempt
    xd_or_smep = xd or bool(cr4 & Cr4.SMEP)
    # (user-mode access, user-mode address): rule by access
    rules: dict[tuple[bool, bool], dict[int, bool]] = {
        (True, True): {READ: True, WRITE: writable, EXECUTE: not xd},
        (True, False): {READ: False, WRITE: False, EXECUTE: False},
        (False, False): {READ: True, WRITE: kernel_write, EXECUTE: not xd},
        (False, True): {READ: smap, WRITE: kernel_write and smap, EXECUTE: not xd_or_smep},
    }
    return rules[user, user_page][access]


def error_of_access(mode: str, access: int, user: bool, cr4: int, nxe: bool) -> int:
    code = (2 if access == WRITE else 0) + (4 if user else 0)
    return code + (16 if access == EXECUTE and (cr4 & Cr4.SMEP or (nxe and mode != "32")) else 0)


def expected(
    path: list[int],
    mode: str,
    cr0: int,
    cr4: int,
    efer: int,
    gva: int,
    access: int,
    user: bool,
    implicit: bool,
    ac: bool,
    width: int,
) -> tuple[str, int] | tuple[str, int, int]:
    """Outcome of a walk that reads the entries `path`, by the tables of the manual, entry by entry.

    Returns ("fault", error code) or ("gpa", address, page size).
    """
    nxe = bool(efer & Efer.NXE)
    user = user and not implicit
    code = error_of_access(mode, access, user, cr4, nxe)
    seen = []
    for shift, entry in zip(PIECES[mode], path, strict=True):
        if entry % 2 == 0:
            return "fault", code
        big = bits(entry, 7, 7) == 1 and (mode, shift) in BIG and (mode != "32" or bool(cr4 & Cr4.PSE))
        if any(bits(entry, high, low) for high, low in must_be_zero(mode, shift, big, nxe, width)):
            return "fault", code | 1 | 8
        seen.append((shift, entry))
        if big:
            break
    shift, leaf = seen[-1]
    ruling = [entry for level, entry in seen if (mode, level) != ("pae", 30)]
    user_page = all(bits(entry, 2, 2) for entry in ruling)
    writable = all(bits(entry, 1, 1) for entry in ruling)
    xd = mode != "32" and any(bits(entry, 63, 63) for entry in ruling)
    if not permitted(access, user, user_page, writable, xd, cr0, cr4, ac and not implicit):
        return "fault", code | 1
    if (mode, shift) == ("32", 22):
        base = bits(leaf, 31, 22) << 22 | bits(leaf, 20, 13) << 32
    else:
        base = bits(leaf, 51 if mode != "32" else 31, shift) << shift
    return "gpa", base + gva % (1 << shift), 1 << shift


class Tables:
    """Memory of entries by guest-physical address; anything else is a failure of the test."""

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}

    def read(self, gpa: int, size: int) -> int:
        assert size in (4, 8)
        return self.entries[gpa]

    def place(self, mode: str, cr3: int, gva: int, path: list[int]) -> None:
        """Puts the entries where a walk of `gva` finds them; two levels may not share a slot."""
        size, index_bits = (4, 10) if mode == "32" else (8, 9)
        table = cr3
        for shift, entry in zip(
            {"32": [22, 12], "pae": [30, 21, 12], "long": [39, 30, 21, 12]}[mode], path, strict=True
        ):
            index = bits(gva, shift + (1 if shift == 30 and mode == "pae" else index_bits - 1), shift)
            assert table + index * size not in self.entries
            self.entries[table + index * size] = entry
            table = bits(entry, 51 if size == 8 else 31, 12) << 12


def entry_of(mode: str, number: int) -> st.SearchStrategy[int]:
    """An entry whose frame is its own, with interesting flag bits."""
    flags = st.lists(st.sampled_from([1, 2, 5, 6, 7, 8, 12, 13, 20, 21, 52, 63, 39, 40, 51]), max_size=3, unique=True)
    usual = st.sampled_from([0x7, 0x3, 0x5, 0x1, 0x27, 0x67, 0x0, 0x87])
    limit = 31 if mode == "32" else 63

    def build(base: int, extra: list[int]) -> int:
        value = base | (number + 2) << 24
        for bit in extra:
            if bit <= limit:
                value ^= 1 << bit
        return value

    return st.builds(build, usual, flags)


@st.composite
def cases(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    mode = draw(st.sampled_from(sorted(MODES)))
    cr0, cr4, efer = MODES[mode]
    cr0 |= draw(st.sampled_from([0, Cr0.WP]))
    for flag in (Cr4.SMEP, Cr4.SMAP, Cr4.PSE):
        cr4 |= draw(st.sampled_from([0, flag]))
    efer |= draw(st.sampled_from([0, Efer.NXE]))
    gva = draw(
        st.integers(0, (1 << 32) - 1)
        if mode != "long"
        else st.integers(0, (1 << 47) - 1) | st.integers(0xFFFF800000000000, (1 << 64) - 1)
    )
    path = [draw(entry_of(mode, number)) for number in range(len(PIECES[mode]))]
    width = draw(st.sampled_from([36, 40, 46]))
    return mode, int(cr0), int(cr4), int(efer), gva, path, width


@settings(max_examples=600)
@given(
    cases(),
    st.sampled_from([READ, WRITE, EXECUTE]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_walk_follows_the_manual(case, access, user, implicit, ac):  # type: ignore[no-untyped-def]
    mode, cr0, cr4, efer, gva, path, width = case
    tables = Tables()
    tables.place(mode, 0x1000, gva, path)
    result = paging.walk(
        tables.read,
        cr0=cr0,
        cr3=0x1000,
        cr4=cr4,
        efer=efer,
        gva=gva,
        access=access,
        user=user,
        implicit=implicit,
        ac=ac,
        physical_bits=width,
    )
    wanted = expected(path, mode, cr0, cr4, efer, gva, access, user, implicit, ac, width)
    if isinstance(result, paging.PageFault):
        assert wanted == ("fault", result.error_code)
        assert result.address == gva
        assert type(result.error_code) is int
    else:
        assert wanted == ("gpa", result.gpa, result.page_size)
        # A and D, entry by entry, from the manual's section 4.8.
        leaf = len(result.entries) - 1
        for position, entry in enumerate(result.entries):
            has_flags = not (mode == "pae" and position == 0)
            new = entry.value | (0x20 if has_flags else 0) | (0x40 if position == leaf and access == WRITE else 0)
            updates = [update for update in result.updates if update.address == entry.address]
            assert [(update.old, update.new) for update in updates] == (
                [(entry.value, new)] if new != entry.value else []
            )


def long_walk(entries: dict[int, int], gva: int = 0, **changes: object) -> paging.Translation | paging.PageFault:
    usual = {"cr0": Cr0.PG | Cr0.PE | Cr0.WP, "cr3": 0x1000, "cr4": Cr4.PAE, "efer": Efer.LMA | Efer.NXE, "gva": gva}
    arguments: dict[str, object] = usual | changes
    return paging.walk(lambda gpa, size: entries[gpa], **arguments)  # type: ignore[arg-type]


CHAIN = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x5007}


def test_no_paging_is_identity() -> None:
    result = paging.walk(lambda gpa, size: 0, cr0=Cr0.PE, cr3=0, cr4=0, efer=0, gva=0x1_2345_6789)
    assert isinstance(result, paging.Translation)
    assert (result.gpa, result.entries) == (0x23456789, ())


def test_supervisor_write_to_read_only_page_depends_on_wp() -> None:
    entries = CHAIN | {0x4000: 0x5005}
    refused = long_walk(entries, access=WRITE)
    assert isinstance(refused, paging.PageFault)
    assert refused.error_code == 3
    allowed = long_walk(entries, access=WRITE, cr0=Cr0.PG | Cr0.PE)
    assert isinstance(allowed, paging.Translation)
    assert not allowed.writable


def test_rights_come_from_every_level() -> None:
    entries = CHAIN | {0x2000: 0x3003 | NX}
    result = long_walk(entries)
    assert isinstance(result, paging.Translation)
    assert (result.writable, result.user, result.executable) == (True, False, False)


def test_cr3_low_bits_are_no_address() -> None:
    result = long_walk(CHAIN, cr3=0x1FFF)
    assert isinstance(result, paging.Translation)
    assert result.gpa == 0x5000


@pytest.mark.parametrize("gva", [0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63])
def test_non_canonical_addresses_are_refused_before_the_walk(gva: int) -> None:
    with pytest.raises(paging.NonCanonicalAddress):
        long_walk({}, gva=gva)


def test_five_levels_are_refused_by_name() -> None:
    with pytest.raises(paging.UnsupportedPaging, match="LA57"):
        long_walk(CHAIN, cr4=Cr4.PAE | Cr4.LA57)


def test_what_the_reader_raises_comes_through() -> None:
    class Refused(Exception):
        pass

    def read(gpa: int, size: int) -> int:
        raise Refused(gpa)

    with pytest.raises(Refused):
        paging.walk(read, cr0=Cr0.PG, cr3=0x1000, cr4=0, efer=0, gva=0)
