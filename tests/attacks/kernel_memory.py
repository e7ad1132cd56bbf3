"""Kernel text and rodata: written through the direct map, through new mappings, or replaced by a page-table entry."""

from __future__ import annotations

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab_attacks.evidence import Attack, Attempts, Evidence, observe
from vtlab_attacks.hypercalls import hypercall_output
from vtlab_attacks.state import (
    ACCESSED,
    DIRTY,
    GLOBAL,
    NX,
    PAGE,
    PRESENT,
    SPARE_WINDOW,
    WRITABLE,
    direct,
    entry_gpa,
    memory,
    show_bytes,
)

VICTIM = "static_key_audit"  # returns 0, until its site is patched
RETURN_BAD = bytes.fromhex("b8ad0b0000c39090")  # mov $0xbad, %eax; ret
HEKI_MEMORY = "Heki v2, memory permissions (Salaün, Venkataraman 2023)"


def _text(machine: Machine, symbols: Symbols) -> bytes | None:
    code: bytes | None = memory(machine, symbols.physical(VICTIM))
    return code


def _is_bad(_before: object, after: object) -> bool:
    return after == RETURN_BAD


def write_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, direct(symbols.physical(VICTIM)), RETURN_BAD)

    what = f"code of {VICTIM}"
    return observe(what, lambda: _text(machine, symbols), steps, symbols, _is_bad, show_bytes)


def write_rodata(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    target = symbols.physical("driver_banner")

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, direct(target), b"pwned ro")

    return observe(
        "rodata driver_banner",
        lambda: memory(machine, target),
        steps,
        symbols,
        lambda _, after: after == b"pwned ro",
        show_bytes,
    )


def alias_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A second, writable mapping of text, made by a store to the page table."""
    entry = entry_gpa(machine, SPARE_WINDOW)
    page = symbols.physical(VICTIM) & -PAGE
    value = page | PRESENT | WRITABLE | ACCESSED | DIRTY | NX

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write, direct(entry), value)
        attempts.step(driver.call, symbols["invlpg"], SPARE_WINDOW)
        attempts.step(driver.write_bytes, SPARE_WINDOW + symbols[VICTIM] % PAGE, RETURN_BAD)

    what = f"code of {VICTIM}"
    return observe(what, lambda: _text(machine, symbols), steps, symbols, _is_bad, show_bytes)


def alias_text_by_service(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The same mapping, asked for in the way the kernel asks."""
    page = symbols.physical(VICTIM) & -PAGE

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.map, SPARE_WINDOW, page, PRESENT | WRITABLE | NX)
        attempts.step(driver.write_bytes, SPARE_WINDOW + symbols[VICTIM] % PAGE, RETURN_BAD)

    what = f"code of {VICTIM}"
    return observe(what, lambda: _text(machine, symbols), steps, symbols, _is_bad, show_bytes)


def remap_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The page of text is replaced as a whole: a changed copy takes its place in the page table."""
    address, copy = symbols[VICTIM], symbols["driver_mailbox"]
    driver.copy(copy, address & -PAGE, PAGE)
    driver.write_bytes(copy + address % PAGE, RETURN_BAD)
    entry = entry_gpa(machine, address)
    value = symbols.physical("driver_mailbox") | PRESENT | ACCESSED | GLOBAL

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write, direct(entry), value)
        attempts.step(driver.call, symbols["invlpg"], address)

    def state() -> tuple[int, int]:
        return machine.translate(address).gpa, driver.call(address)

    return observe(
        f"GPA behind {VICTIM}, and what it returns",
        state,
        steps,
        symbols,
        lambda _, after: after[1] == 0xBAD,
        lambda pair: f"{pair[0]:#x}, {pair[1]:#x}",
    )


def debugger_text(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """Not the guest but a client of the VMM, which has VTL0's rights and no more."""
    target = symbols.physical(VICTIM)

    def steps(attempts: Attempts) -> None:
        attempts.step(machine.write_memory, target, RETURN_BAD)

    what = f"code of {VICTIM}"
    return observe(what, lambda: _text(machine, symbols), steps, symbols, _is_bad, show_bytes)


def patch_unlisted(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A static key's site gets code that is not on the list, by the kernel's own way to patch."""

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.patch, symbols[VICTIM], RETURN_BAD[:5])

    return observe(
        f"code of {VICTIM}",
        lambda: (_text(machine, symbols) or b"")[:5],
        steps,
        symbols,
        lambda _, after: after == RETURN_BAD[:5],
        show_bytes,
    )


def frame_into_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The stack pointer goes to the end of kernel text, in the direct map; then an exception writes its frame there.

    Under VTL1 neither that frame nor the one of the #GP after it can be written, so it is #DF, on a stack of its own.
    """
    end = symbols.physical("text_start") + symbols.sections[".text"].size

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_pivot"], direct(end))

    return observe("last bytes of kernel text", lambda: memory(machine, end - 16, 16), steps, symbols, show=show_bytes)


def hypercall_into_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    return hypercall_output(VICTIM, f"code of {VICTIM}", machine, driver, symbols)


ATTACKS = [
    Attack("text-write", "Overwrites kernel text through the direct map", HEKI_MEMORY, write_text),
    Attack("rodata-write", "Overwrites a kernel constant through the direct map", HEKI_MEMORY, write_rodata),
    Attack("text-alias", "Maps kernel text a second time, writable, and writes it", HEKI_MEMORY, alias_text),
    Attack(
        "text-alias-service",
        "Asks the kernel's mapping service for that alias",
        "LVBS, W^X of mappings",
        alias_text_by_service,
    ),
    Attack(
        "text-remap",
        "Puts a changed copy in text's place by one page-table entry",
        "Davi et al. 2017, PT-Rand",
        remap_text,
    ),
    Attack(
        "patch-unlisted", "Patches kernel text with code that is not on the list", "LVBS PATCH_TEXT", patch_unlisted
    ),
    Attack(
        "text-frame",
        "Has the processor write an exception frame into kernel text",
        "Confused deputy: what the processor writes for the guest",
        frame_into_text,
    ),
    Attack(
        "text-hypercall-output",
        "Names kernel text as the output of a hypercall",
        "TLFS, output parameters need the caller's write access",
        hypercall_into_text,
    ),
    Attack(
        "debugger-text",
        "Overwrites kernel text from outside, as the VMM's client",
        "Heki thread (Christopherson 2023): whoever can coerce userspace can write",
        debugger_text,
    ),
]
