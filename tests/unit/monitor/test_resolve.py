"""A policy against an image: what is absent, unaligned, contradicting or outside RAM is told with line and key."""

from __future__ import annotations

import pytest

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from vtl0_guest.kernels import selfguard_image
from vtl1_monitor import rights
from vtl1_monitor.policy.image import BootImage
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.render import render
from vtl1_monitor.policy.resolve import Translate, resolve
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.text import parse
from vtl1_monitor.rights import Run
from vtlab.errors import BadImage
from vtlab.v1 import registers_pb2

HEAD = "version: 1\nname: x\nmemory:\n"
IMAGE = BootImage(image.kernel().elf(), "kernel")


def resolved(rows: str, translate: Translate | None = None, boot: BootImage = IMAGE) -> Rules:
    return resolve(parse(HEAD + rows, "p"), boot, image.RAM_SIZE, translate)


def mapped(gva: int) -> int | None:
    """Kernel addresses as linked; two pages at 0x5000 that are not adjacent in memory."""
    if gva >= image.KERNEL:
        return gva - image.KERNEL
    return {0x5000: 0x10000, 0x6000: 0x20000, 0x7000: 0x21000}.get(gva)


BAD = {
    "- {name: a, section: .absent, access: r--}\n": ("memory.0.section", "no section .absent is loaded by kernel"),
    "- {name: a, symbol: absent, access: r--}\n": ("memory.0.symbol", "no symbol absent in kernel"),
    "- {name: a, symbol: start, access: r--}\n": ("memory.0.symbol", "ends at 0x100010, inside a page"),
    "- {name: a, symbol: printk, size: 3968, access: r--}\n": ("memory.0.symbol", "not the start of a page"),
    "- {name: a, gpa: 0x10, size: 4096, access: r--}\n": ("memory.0.gpa", "not the start of a page"),
    "- {name: a, gpa: 0x3ff000, size: 4097, access: r--}\n": ("memory.0.gpa", "is not RAM (it ends at 0x400000)"),
    "- {name: a, gpa: 0xfffffffffffff000, size: 4096, access: r--}\n": ("memory.0.gpa", "is not RAM"),
    "- {name: a, gva: 0x9000, size: 4096, access: r--}\n": ("memory.0.gva", "0x9000 is not mapped by the guest"),
    "- {name: a, gva: 0x5000, size: 8192, access: r--}\n": ("memory.0.gva", "0x6000 is not mapped at 0x11000"),
    "- {name: a, section: .text, access: r-x}\n- {name: b, gpa: 0x101000, size: 4096, access: r--}\n": (
        "memory.1",
        "'b' and 'a' both cover 0x101000 with different rights",
    ),
    "- {name: a, gpa: 0x101000, size: 4096, access: r--}\n"
    "- {name: b, section: .text, access: r-x, when: end_of_boot}\n": (
        "memory.1",
        "'b' and 'a' both cover 0x101000",
    ),
}


@pytest.mark.parametrize("rows", BAD, ids=range(len(BAD)))
def test_problems_have_line_and_key(rows: str) -> None:
    key, message = BAD[rows]
    with pytest.raises(PolicyProblems) as caught:
        resolved(rows, mapped)
    assert caught.value.key == key
    assert message in caught.value.detail
    assert caught.value.line == 3 + rows.count("\n")


def test_a_later_phase_may_tighten() -> None:
    rows = "- {name: a, section: .text, access: r-x}\n- {name: b, section: .text, access: r--, when: end_of_boot}\n"
    assert [rule.name for rule in resolved(rows).memory] == ["a", "b"]


def test_gva_ranges_go_through_the_guests_tables() -> None:
    rules = resolved("- {name: a, gva: 0x6000, size: 8192, access: r--}\n", mapped)
    assert rules.memory[0].run == Run(0x20, 2)
    with pytest.raises(PolicyProblems, match="before the guest has page tables"):
        resolved("- {name: a, gva: 0x6000, size: 8192, access: r--}\n")


def test_an_end_inside_a_page_reaches_to_its_end_unless_something_else_is_there() -> None:
    sections = [
        image.Section(".a", 0x1000, 100, bytes(100)),
        image.Section(".b", 0x1080, 100, bytes(100)),
        image.Section(".c", 0x3000, 100, bytes(100)),
    ]
    boot = BootImage(image.KernelImage(sections).elf(), "k")
    assert resolved("- {name: c, section: .c, access: r--}\n", boot=boot).memory[0].run == Run(3, 1)
    with pytest.raises(PolicyProblems, match=r"ends at 0x1064, in the page of section \.b"):
        resolved("- {name: a, section: .a, access: r--}\n", boot=boot)


def test_sections_of_kdata_must_be_sealed_and_measured() -> None:
    text = "version: 1\nname: x\npatches:\n  section: .patches\n"
    with pytest.raises(PolicyProblems) as caught:
        resolve(parse(text, "p"), IMAGE, image.RAM_SIZE, None)
    assert (caught.value.line, caught.value.key) == (4, "patches.section")
    rules = resolve(
        parse(text + "memory: [{name: p, section: .patches, access: r--}]\n", "p"), IMAGE, image.RAM_SIZE, None
    )
    assert rules.patches == (image.PATCHES, 72)


def test_frozen_registers_leave_out_what_a_guest_changes() -> None:
    text = "version: 1\nname: x\nregisters: {cr0: frozen, cr4: {frozen: true}, efer: {frozen: [LMA]}}\n"
    registers = resolve(parse(text), IMAGE, image.RAM_SIZE, None).registers
    every = (1 << 64) - 1
    assert registers[registers_pb2.REGISTER_NAME_CR0].frozen_mask == every & ~(1 << 3 | 1 << 31)
    assert registers[registers_pb2.REGISTER_NAME_CR4].frozen_mask == every & ~(1 << 7 | 1 << 17 | 1 << 12)
    assert registers[registers_pb2.REGISTER_NAME_EFER].frozen_mask == 1 << 10


def test_stores_follow_from_rights() -> None:
    rules = resolve(parse(POLICY), IMAGE, image.RAM_SIZE, None)
    codes = {rule.name: rights.access_text(rule.code) for rule in rules.memory}
    assert codes["text"] == "r-x kernel"
    assert codes["vtl1"] == "--- private"
    assert rules.default_code is not None
    assert rights.access_text(rules.default_code) == "rwx user"
    stores = {rule.name: rule.code & rights.STORE_MASK for rule in rules.memory}
    assert stores["text"] == stores["cr writers"] == rights.SEALED
    assert stores["vtl1"] == rights.PRIVATE


def test_expected_bytes_are_those_of_a_loader() -> None:
    page = IMAGE.expected(image.RODATA, image.PAGE)
    assert page == bytes(range(100)) + bytes(image.PAGE - 100)
    assert IMAGE.expected(image.HYPERCALL_PAGE, 16) == bytes(16)
    flat = BootImage(b"\xf4" * 10, "flat", 0x1000)
    assert flat.expected(0xFFE, 14) == bytes(2) + b"\xf4" * 10 + bytes(2)


@pytest.mark.parametrize("cut", [16, 63, 64, 100, 200])
def test_truncated_images_are_refused(cut: int) -> None:
    with pytest.raises(BadImage):
        BootImage(image.kernel().elf()[:cut], "kernel")


def test_a_flat_image_has_no_sections() -> None:
    with pytest.raises(PolicyProblems, match="flat is no ELF file"):
        resolved("- {name: a, section: .text, access: r--}\n", boot=BootImage(b"\xf4", "flat", 0x1000))


def test_the_policy_of_our_own_guest() -> None:
    """It resolves against its image, and says what the guest's page tells."""
    kernel = selfguard_image()
    policy = kernel.with_name("policy.yaml").read_bytes()
    rules = resolve(parse(policy, "policy.yaml"), BootImage(kernel.read_bytes(), "selfguard"), 64 << 20, None)
    lines = render(rules)
    assert any(line.startswith("cr writers: ---") for line in lines)
    assert len(lines) == len(set(lines))
