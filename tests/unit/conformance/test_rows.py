"""The rows as data: complete, compiled as the guest expects them, reported for what they are."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from vmm.hypercalls import HYPERCALLS
from vtlab.errors import LimitExceeded
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.profiles import PROFILES
from vtlab.hyperv.status import HvStatus
from vtlab_conformance import code, document, layout, report
from vtlab_conformance.calls import By, call, row
from vtlab_conformance.image import image, symbols, table
from vtlab_conformance.layout import Answer, Flag, Op
from vtlab_conformance.runner import Result, judge
from vtlab_conformance.scenarios import SCENARIOS
from vtlab_conformance.steps import Put, Row, Run, See, broken
from vtlab_conformance.unreachable import UNREACHABLE, pairs

ROOT = Path(__file__).parents[3]
LAYOUT_H = (ROOT / "vtl0_guest/kernels/conformance/layout.h").read_text()
profiles = pytest.mark.parametrize("profile", sorted(PROFILES))


def rows_of(profile: str) -> list[Row]:
    return [found for scenario in SCENARIOS for found in scenario.rows(profile)]


@profiles
def test_there_are_rows_of_every_section(profile: str) -> None:
    rows = rows_of(profile)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) >= 150
    assert {row.section[0] for row in rows} == set("23456")
    for found in rows:
        assert re.fullmatch(r"[2-6]\.[a-z0-9-]+(\.[a-z0-9-]+)?", found.name), found.name
        assert found.rule, found.name
        assert found.source, found.name
        assert any(isinstance(step, Run | See) for step in found.steps), found.name


def test_profiles_have_the_same_rows() -> None:
    first, *others = [[row.name for row in rows_of(profile)] for profile in sorted(PROFILES)]
    assert all(other == first for other in others)


@profiles
def test_every_status_of_every_hypercall_is_reached_or_said_not_to_be(profile: str) -> None:
    reached = {pair for row in rows_of(profile) for pair in row.pairs()}
    can_be = {(int(number), int(status)) for number, status in HYPERCALLS.statuses(profile)}
    assert can_be - reached == pairs(profile)
    beyond = reached - can_be
    assert {status for _, status in beyond} == {HvStatus.INVALID_HYPERCALL_CODE}
    assert not {number for number, _ in beyond} & set(HypercallCode)


def test_what_is_unreachable_has_a_reason() -> None:
    assert all(item.reason and set(item.profiles) <= set(PROFILES) for item in UNREACHABLE)


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/conformance.md").read_text() == document.page(), (
        "python -m vtlab_conformance.document > docs/conformance.md"
    )


def defined(name: str) -> int:
    found = re.search(rf"^#define {name} (\w+)", LAYOUT_H, re.MULTILINE)
    assert found, name
    return int(found[1], 0)


@pytest.mark.parametrize(
    "name", [name for name, value in vars(layout).items() if name.isupper() and isinstance(value, int)]
)
def test_addresses_are_those_of_the_guest(name: str) -> None:
    if name in ("RAM", "PAGES", "NO_RAM"):
        pytest.skip("the guest does not know it")
    assert getattr(layout, name) == defined(name)


@pytest.mark.parametrize("kind", [Op, Flag, Answer])
def test_numbers_are_those_of_the_guest(kind: type[Op | Flag | Answer]) -> None:
    for member in kind:
        assert member.value == defined(f"{kind.__name__.upper()}_{member.name}"), member


# CALL [GS:disp32], which the assembler would make relative to RIP.
_CALL_GS = ".byte 0x65, 0xff, 0x14, 0x25"
ASSEMBLY = {
    "RET": "ret",
    "READ_CR0": "mov rax, cr0; ret",
    "READ_CR4": "mov rax, cr4; ret",
    "CHANGE_CR0": "mov rax, cr0; xor rax, rdx; mov cr0, rax; mov rax, cr0; ret",
    "CHANGE_CR4": "mov rax, cr4; xor rax, rdx; mov cr4, rax; mov rax, cr4; ret",
    "RDMSR": "rdmsr; shl rdx, 32; or rax, rdx; ret",
    "WRMSR": "mov eax, r8d; mov rdx, r8; shr rdx, 32; wrmsr; ret",
    "LOAD": "mov rax, qword ptr [rdx]; ret",
    "STORE": "mov qword ptr [rdx], r8; ret",
    "CALL": "call rdx; ret",
    "LGDT": "lgdt [rdx]; ret",
    "LIDT": "lidt [rdx]; ret",
    "SGDT": "sgdt [rdx]; ret",
    "SIDT": "sidt [rdx]; ret",
    "LLDT": "lldt dx; ret",
    "LTR": "ltr dx; ret",
    "XSETBV": "xor ecx, ecx; mov eax, r8d; xor edx, edx; xsetbv; ret",
    "IN_BYTE": "xor eax, eax; in al, dx; ret",
    "OUT_BYTE": "mov al, r8b; out dx, al; ret",
    "OUT_DWORD": "mov eax, r8d; out dx, eax; ret",
    "HALT": "hlt; ret",
    "SPIN": "again: pause; jmp again",
    "CPUID_EBX": "mov eax, ecx; xor ecx, ecx; push rbx; cpuid; mov eax, ebx; pop rbx; ret",
    "READ_DR0": "mov rax, dr0; ret",
    "WRITE_DR0": "mov dr0, rdx; ret",
    "READ_CR2": "mov rax, cr2; ret",
    "WRITE_CR2": "mov cr2, rdx; ret",
    "VTL_CALL": f"{_CALL_GS}, 64, 0, 0, 0; ret",
    "VTL_RETURN": f"{_CALL_GS}, 72, 0, 0, 0; ret",
    "CALL_PAGE": f"xor eax, eax; {_CALL_GS}, 56, 0, 0, 0; ret",
    "ARM": "mov r9, rdx; mov ecx, 0x40000020; rdmsr; shl rdx, 32; or rax, rdx; add rax, r9; mov rdx, rax; shr rdx, 32; "
    "mov ecx, 0x400000b1; wrmsr; ret",
    "USER_END": "int 0x80",
}


def test_machine_code_is_what_it_says() -> None:
    known = {name: value for name, value in vars(code).items() if isinstance(value, bytes)}
    assert known.keys() == ASSEMBLY.keys()
    assembler = Ks(KS_ARCH_X86, KS_MODE_64)
    for name, text in ASSEMBLY.items():
        assert bytes(assembler.asm(text)[0]) == known[name], name


@pytest.mark.parametrize(
    ("snippet", "at"), [("CHANGE_CR4", "CHANGE_CR_AT"), ("WRMSR", "WRMSR_AT"), ("XSETBV", "XSETBV_AT")]
)
def test_offsets_point_at_the_instruction(snippet: str, at: str) -> None:
    text = ASSEMBLY[snippet].split("; ")
    before = {"CHANGE_CR4": 2, "WRMSR": 3, "XSETBV": 3}[snippet]
    assembler = Ks(KS_ARCH_X86, KS_MODE_64)
    assert len(assembler.asm("; ".join(text[:before]))[0]) == getattr(code, at)


@profiles
def test_every_boot_fits_its_image(profile: str) -> None:
    for scenario in SCENARIOS:
        made = image(scenario.rows(profile))
        magic, flags, checksum, header, load, load_end, bss_end, entry = struct.unpack_from("<8I", made)
        assert (magic + flags + checksum) & 0xFFFFFFFF == 0
        assert (header, load) == (0x100000, 0x100000)
        assert load_end - load == len(made)
        assert load_end <= bss_end <= layout.REPORT
        assert entry == symbols()["multiboot_entry"]


def test_a_table_that_is_too_large_is_refused() -> None:
    large = row("2.large", "2", "large", "nobody", Put(at=0, data=bytes(0x18000)), call(0x7E))
    with pytest.raises(LimitExceeded):
        image([large])


def test_the_table_ends() -> None:
    assert table([]) == b"VTLC\1\0\0\0" + bytes([255, 0, 0, 0, 8, 0, 0, 0])


ROWS = SCENARIOS[0].rows("openvmm")[:3]


def test_what_the_guest_says_is_judged() -> None:
    first, second, third = ROWS
    said = f"ROW {first.name} ok\nROW {second.name} FAIL step 0x0 vtl 0x0 vp 0x0: result want 0x4 got 0x3\n"
    results = judge("openvmm", "vtl0", ROWS, said, "triple fault")
    assert [result.ok for result in results] == [True, False, False]
    assert results[1].detail.startswith("step 0x0")
    assert "triple fault" in results[2].detail
    assert third.name == results[2].row.name


def test_a_defect_of_the_guest_fails_the_rows_after_it() -> None:
    results = judge("openvmm", "vtl0", ROWS, "PANIC vtl 0x0 vp 0x0 vector 0xd\n", "stopped")
    assert [result.detail for result in results] == ["PANIC vtl 0x0 vp 0x0 vector 0xd"] * 3


def profile_of(*details: str) -> report.Profile:
    results = [Result("openvmm", "vtl0", row, detail) for row, detail in zip(ROWS, details, strict=True)]
    return report.Profile("openvmm", results, 1.25)


def test_a_report_counts() -> None:
    told = profile_of("", "wrong", "")
    assert told.summary().startswith("conformance: openvmm: rows 3, ok 2, failed 1; ")
    assert told.sections() == [(ROWS[0].section, 3, 1)]
    assert told.reached() == ROWS[0].pairs() | ROWS[2].pairs()


def test_json_has_a_value_for_each_row_and_a_summary() -> None:
    *rows, summary = report.as_json(profile_of("", "wrong", ""))
    assert [row["ok"] for row in rows] == [True, False, True]
    assert summary["failed"] == 1
    assert len(summary["pairs_unreachable"]) == len(pairs("openvmm"))
    json.dumps([*rows, summary])


def test_junit_has_a_case_for_each_row() -> None:
    root = ElementTree.fromstring(report.junit([profile_of("", "wrong", "")]))
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    failure = suite.find(f"testcase[@name='{ROWS[1].name}']/failure")
    assert failure is not None
    assert failure.get("message") == "wrong"


def test_a_broken_row_expects_something_else() -> None:
    wrong = broken(ROWS[0])
    assert wrong.encode() != ROWS[0].encode()
    assert wrong.name == ROWS[0].name


def test_a_row_that_expects_no_result_cannot_be_broken() -> None:
    with pytest.raises(ValueError, match="expects no result"):
        broken(row("2.none", "2", "nothing", "nobody", Put(at=0, data=b"")))


def test_each_profile_takes_its_own_answer() -> None:
    assert [By(profile)(1, 2, 3) for profile in ("tlfs", "openvmm", "kvm")] == [1, 2, 3]
