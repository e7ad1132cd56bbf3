"""Synthetic MSRs, messages and timers as machine code sees them."""

from __future__ import annotations

import struct

import pytest

from tests.unit.cpu.machine import DATA, PDPT, RAM_SIZE, A, Guest
from tests.waiting import wait_until
from vtl0_guest.cpu.hyperv import msrs
from vtlab import errors
from vtlab.hyperv.msrs import HvMsr
from vtlab.v1.registers_pb2 import MsrValue
from vtlab.x86.registers import Msr, Vector

SIMP, SIEFP = 0x210000, 0x211000
VECTOR = 0xB0
# Software-enables the local APIC; turns the SynIC's pages on.
APIC_ON = "mov edi, 0xfee000f0; mov dword ptr [rdi], 0x1ff;"


def wrmsr(index: int, value: int) -> str:
    return f"mov ecx, {int(index)}; mov eax, {value & 0xFFFFFFFF}; mov edx, {value >> 32}; wrmsr;"


def rdmsr(index: int) -> str:
    return f"mov ecx, {int(index)}; rdmsr; shl rdx, 32; or rax, rdx;"


def map_apic(guest: Guest) -> None:
    """The page tables of long_mode() end before the local APIC: PDPT entry 3 and one 2 MiB page."""
    guest.poke(0x14000, bytes(4096))
    guest.poke(PDPT + 24, struct.pack("<Q", 0x14000 | 7))
    guest.poke(0x14000 + 8 * (0xFEE00000 >> 21 & 511), struct.pack("<Q", 0xFEE00000 | 0x83))


def start(guest: Guest, code: str) -> None:
    setup = wrmsr(HvMsr.SIMP, SIMP | 1) + wrmsr(HvMsr.SIEFP, SIEFP | 1)
    guest.long_mode(APIC_ON + setup + code)
    map_apic(guest)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *((index, 0) for index, row in msrs.TABLE.items() if row.write is None),
        (HvMsr.SINT0, 15),
        (HvMsr.SINT0 + 15, 0),
        (HvMsr.SIMP, RAM_SIZE | 1),
        (HvMsr.SIEFP, 0xFEE00001),
        (HvMsr.VP_ASSIST_PAGE, (1 << 63) | 1),
        (HvMsr.REFERENCE_TSC, RAM_SIZE | 1),
    ],
)
def test_writes_that_fault(guest: Guest, index: int, value: int) -> None:
    guest.long_mode(wrmsr(index, value) + "hlt")
    guest.run()
    assert guest.vector == Vector.GP
    assert guest.frame(1) == [0]


@pytest.mark.parametrize("index", [index for index, row in msrs.TABLE.items() if row.read is None])
def test_reads_that_fault(guest: Guest, index: int) -> None:
    guest.long_mode(rdmsr(index) + "hlt")
    guest.run()
    assert guest.vector == Vector.GP


@pytest.mark.parametrize("index", [HvMsr.GUEST_OS_ID, HvMsr.HYPERCALL, HvMsr.RESET, HvMsr.CRASH_CTL, 0x40000118])
def test_what_is_the_machines_still_exits(guest: Guest, index: int) -> None:
    guest.long_mode(rdmsr(index) + "hlt")
    assert guest.run() == "msr"
    assert guest.exit.msr.index == index


@pytest.mark.parametrize(("index", "value"), [(HvMsr.SINT0, 5), (HvMsr.SIMP, RAM_SIZE | 1), (HvMsr.SVERSION, 2)])
def test_what_they_refuse_from_outside_is_dropped(guest: Guest, index: int, value: int) -> None:
    """A hypercall can name any value: it must not end the machine."""
    guest.long_mode("vmmcall;" + rdmsr(index) + "vmmcall")
    guest.run()
    assert guest.run(updates=[A.Update(msr=MsrValue(index=index, value=value))]) == "hypercall"
    assert guest.exit.registers.rax == {HvMsr.SINT0: 1 << 16, HvMsr.SIMP: 0, HvMsr.SVERSION: 1}[HvMsr(index)]


def test_user_code_may_not(guest: Guest) -> None:
    guest.long_mode(rdmsr(HvMsr.VP_INDEX) + "hlt", cpl=3)
    guest.run()
    assert guest.vector == Vector.GP


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (HvMsr.SCONTROL, 0xFFFF_FFFF_FFFF_FFFE),
        (HvMsr.SINT0 + 4, 0x30040),
        (HvMsr.SINT0 + 4, 0x10000),
        (HvMsr.SIMP, SIMP | 1),
        (HvMsr.SIEFP, SIEFP),
        (HvMsr.VP_ASSIST_PAGE, SIMP | 1),
        (HvMsr.REFERENCE_TSC, SIMP | 1),
        (HvMsr.STIMER0_CONFIG, 0x2000A),
        (HvMsr.STIMER0_COUNT + 6, 12345678901),
    ],
)
def test_values_are_kept(guest: Guest, index: int, value: int) -> None:
    guest.long_mode(wrmsr(index, value) + rdmsr(index) + "vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == value
    assert {entry.index: entry.value for entry in guest.processor.state().msrs}[index] == value


def test_a_page_that_vtl1_took_away_is_refused(guest: Guest) -> None:
    guest.protect(SIMP, access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    guest.long_mode(wrmsr(HvMsr.SIMP, SIMP | 1) + "hlt")
    guest.run()
    assert guest.vector == Vector.GP


def test_a_page_taken_away_later_is_not_written(guest: Guest) -> None:
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR) + "vmmcall; nop; vmmcall")
    assert guest.run() == "hypercall"
    guest.protect(SIMP, access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    message = A.SynicMessage(sint=2, type=1, payload=b"secret")
    assert guest.run(updates=[A.Update(synic_message=message)]) == "hypercall"
    assert not any(guest.memory[SIMP : SIMP + 4096])
    assert list(guest.exit.synic_delivered) == []


def test_a_message_interrupts_the_guest(guest: Guest) -> None:
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR) + "sti; vmmcall; l: pause; jmp l")
    assert guest.run() == "hypercall"
    message = A.SynicMessage(sint=2, type=0x77, origin=5, payload=b"abc")
    assert guest.run(updates=[A.Update(synic_message=message)]) == "hypercall"
    assert guest.vector == VECTOR
    assert struct.unpack_from("<IBBHQ3s", guest.memory, SIMP + 512) == (0x77, 3, 0, 0, 5, b"abc")
    assert list(guest.exit.synic_delivered) == [2]


def test_a_message_ends_a_halt(guest: Guest) -> None:
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR | 1 << 17) + "vmmcall; sti; hlt; l: jmp l")
    assert guest.run() == "hypercall"
    guest.processor.kick()
    assert guest.run() == "kicked"
    update = A.Update(synic_message=A.SynicMessage(sint=2, type=1))
    assert guest.run(updates=[update]) == "hypercall"
    assert guest.vector == VECTOR


def test_a_second_message_waits_for_eom(guest: Guest) -> None:
    take = f"mov dword ptr [{SIMP + 512}], 0;" + wrmsr(HvMsr.EOM, 0) + "vmmcall;"
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR | 1 << 16 | 1 << 18) + "vmmcall; nop; vmmcall;" + take)
    guest.run()
    updates = [A.Update(synic_message=A.SynicMessage(sint=2, type=number)) for number in (1, 2)]
    assert guest.run(updates=updates) == "hypercall"
    assert (guest.peek(SIMP + 512, 4), guest.peek(SIMP + 517, 1)) == (1, 1)
    assert list(guest.exit.synic_delivered) == [2]
    assert guest.run() == "hypercall"
    assert (guest.peek(SIMP + 512, 4), guest.peek(SIMP + 517, 1)) == (2, 0)
    assert list(guest.exit.synic_delivered) == [2]


def test_flags_interrupts_and_vectors_from_outside(guest: Guest) -> None:
    start(guest, wrmsr(HvMsr.SINT0 + 9, 0x90 | 1 << 17) + "sti; vmmcall; l: jmp l")
    guest.run()
    assert guest.run(updates=[A.Update(synic_event=A.SynicEvent(sint=9, flag=33))]) == "hypercall"
    assert guest.vector == 0x90
    assert guest.peek(SIEFP + 9 * 256 + 4, 1) == 2
    assert guest.run(updates=[A.Update(synic_interrupt=A.SynicInterrupt(sint=9))]) == "hypercall"
    # Interrupts are off in the handler, so this one comes after its IRET.
    assert guest.vector == 0x90
    assert guest.run(updates=[A.Update(apic_interrupt=A.ApicInterrupt(vector=0xA1))]) == "hypercall"
    assert guest.vector == 0xA1


@pytest.mark.parametrize(
    "update",
    [
        A.Update(synic_message=A.SynicMessage(sint=16, type=1)),
        A.Update(synic_message=A.SynicMessage(sint=0, type=0)),
        A.Update(synic_message=A.SynicMessage(sint=0, type=1, payload=bytes(241))),
        A.Update(synic_event=A.SynicEvent(sint=0, flag=2048)),
        A.Update(synic_event=A.SynicEvent(sint=16)),
        A.Update(synic_interrupt=A.SynicInterrupt(sint=16)),
        A.Update(apic_interrupt=A.ApicInterrupt(vector=15)),
        A.Update(apic_interrupt=A.ApicInterrupt(vector=256)),
    ],
)
def test_updates_out_of_range_run_nothing(guest: Guest, update: A.Update) -> None:
    guest.long_mode("inc qword ptr [0x200000]; vmmcall")
    with pytest.raises(errors.BadArgument):
        guest.run(updates=[update])
    assert guest.peek(DATA) == 0


@pytest.mark.parametrize("interrupts", ["cli", "sti"])
def test_guest_idle_waits_whatever_if_says(guest: Guest, interrupts: str) -> None:
    """A direct timer of 20 ms ends it; with interrupts off the guest goes on behind the read."""
    begin = rdmsr(HvMsr.TIME_REF_COUNT) + "mov rbx, rax;"
    timer = wrmsr(HvMsr.STIMER0_CONFIG, 0x1008 | 0xC3 << 4) + (
        f"lea rax, [rbx + 200000]; mov rdx, rax; shr rdx, 32; mov ecx, {int(HvMsr.STIMER0_COUNT)}; wrmsr;"
    )
    end = rdmsr(HvMsr.TIME_REF_COUNT) + "sub rax, rbx; vmmcall"
    start(guest, begin + timer + f"{interrupts};" + rdmsr(HvMsr.GUEST_IDLE) + end)
    assert guest.run() == "hypercall"
    if interrupts == "sti":
        assert guest.vector == 0xC3
        return
    assert guest.vector is None
    assert guest.exit.registers.rax >= 200000


def test_a_periodic_timer_of_100_us_reaches_a_guest_with_interrupts_off(guest: Guest) -> None:
    """Polled: the message is seen in memory, with no interrupt."""
    poll = f"l: cmp dword ptr [{SIMP + 256}], 0; je l; mov dword ptr [{SIMP + 256}], 0;"
    poll += wrmsr(HvMsr.EOM, 0) + "dec ebx; jnz l; vmmcall"
    timer = wrmsr(HvMsr.STIMER0_CONFIG, 0x1000A) + wrmsr(HvMsr.STIMER0_COUNT, 1000)
    start(guest, wrmsr(HvMsr.SINT0 + 1, 1 << 16 | 1 << 18) + "mov ebx, 5;" + timer + poll)
    assert guest.run() == "hypercall"


def test_msr_and_page_agree(guest: Guest) -> None:
    """The guest computes the time from the page between two reads of the MSR, after setting its own counter."""
    page = SIMP
    compute = f"rdtsc; shl rdx, 32; or rax, rdx; mul qword ptr [{page + 8}]; add rdx, [{page + 16}]; mov rsi, rdx;"
    guest.long_mode(
        wrmsr(Msr.TSC, 12345)
        + wrmsr(HvMsr.REFERENCE_TSC, page | 1)
        + rdmsr(HvMsr.TIME_REF_COUNT)
        + "mov rbx, rax;"
        + compute
        + rdmsr(HvMsr.TIME_REF_COUNT)
        + "vmmcall"
    )
    assert guest.run() == "hypercall"
    registers = guest.exit.registers
    assert guest.peek(page, 4) != 0
    assert registers.rbx - 2 <= registers.rsi <= registers.rax


def test_run_time_excludes_waiting(guest: Guest) -> None:
    guest.long_mode(rdmsr(HvMsr.VP_RUNTIME) + "mov rbx, rax;" + rdmsr(HvMsr.VP_RUNTIME) + "vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rbx <= guest.exit.registers.rax < 10_000_000
    before = guest.processor.context.hyperv.runtime.value()
    assert guest.processor.context.hyperv.runtime.value() == before


def test_a_processor_that_is_not_entered_gets_its_messages(guest: Guest) -> None:
    """A timer that expires while the vCPU is outside: message and interrupt are there without an enter."""
    woken: list[int] = []
    wakes = guest.platform.on_wake

    def on_wake(vp_index: int) -> None:
        wakes(vp_index)
        woken.append(vp_index)

    guest.platform.on_wake = on_wake
    timer = wrmsr(HvMsr.STIMER0_CONFIG, 0x20008) + rdmsr(HvMsr.TIME_REF_COUNT)
    later = f"add rax, 50000; mov rdx, rax; shr rdx, 32; mov ecx, {int(HvMsr.STIMER0_COUNT)}; wrmsr; vmmcall"
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR) + timer + later)
    assert guest.run() == "hypercall"
    wait_until(lambda: guest.platform.pending_vector(0) == VECTOR)
    assert guest.peek(SIMP + 512, 4) == 0x80000010
    assert woken


def test_a_load_is_a_reset(guest: Guest) -> None:
    start(guest, wrmsr(HvMsr.SINT0 + 2, VECTOR) + wrmsr(HvMsr.STIMER0_CONFIG, 0x2000A) + "vmmcall")
    guest.run()
    guest.long_mode(rdmsr(HvMsr.SINT0 + 2) + "mov rbx, rax;" + rdmsr(HvMsr.SIMP) + "vmmcall")
    assert guest.run() == "hypercall"
    assert (guest.exit.registers.rbx, guest.exit.registers.rax) == (1 << 16, 0)


def compare(pause: str = "") -> str:
    """RDX = TIME_REF_COUNT minus the page's time, `pause` between the reads."""
    page_time = f"rdtsc; shl rdx, 32; or rax, rdx; mul qword ptr [{SIMP + 8}]; add rdx, [{SIMP + 16}]; mov rsi, rdx;"
    return page_time + pause + rdmsr(HvMsr.TIME_REF_COUNT) + "sub rax, rsi;"


def test_clocks_compared_are_read_at_one_instant(guest: Guest) -> None:
    """After a read of the MSR, the next pair of reads differs by nothing, whatever the host does in between."""
    setup = wrmsr(HvMsr.REFERENCE_TSC, SIMP | 1) + rdmsr(HvMsr.TIME_REF_COUNT) + "mov r9d, 200;"
    loop = "l: " + compare() + "or r8, rax; dec r9d; jnz l; mov rax, r8; vmmcall"
    guest.long_mode(setup + "xor r8d, r8d;" + loop)
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 0


def test_work_between_the_reads_is_seen(guest: Guest) -> None:
    """A loop of 50 million rounds is no instant."""
    setup = wrmsr(HvMsr.REFERENCE_TSC, SIMP | 1) + rdmsr(HvMsr.TIME_REF_COUNT)
    guest.long_mode(setup + compare("mov ebx, 50000000; w: dec ebx; jnz w;") + "vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax > 50_000


def test_a_second_reading_of_the_counter_ends_it(guest: Guest) -> None:
    """RDTSC and RDTSCP run in the engine again, and the MSR tells the time of its own reading."""
    setup = wrmsr(HvMsr.REFERENCE_TSC, SIMP | 1) + wrmsr(Msr.TSC_AUX, 77) + rdmsr(HvMsr.TIME_REF_COUNT)
    guest.long_mode(setup + "rdtscp; mov r8, rcx; rdtsc; rdtsc;" + compare() + "vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax > 0
    assert guest.exit.registers.r8 == 77


def test_an_exit_between_the_reads_ends_it(guest: Guest) -> None:
    """Another level may run meanwhile, and see a later time."""
    setup = wrmsr(HvMsr.REFERENCE_TSC, SIMP | 1) + rdmsr(HvMsr.TIME_REF_COUNT)
    guest.long_mode(setup + compare("vmmcall;") + "vmmcall")
    guest.run()
    guest.run()
    assert guest.exit.registers.rax > 0


def test_without_the_page_the_counter_never_exits(guest: Guest) -> None:
    guest.long_mode(rdmsr(HvMsr.TIME_REF_COUNT) + "rdtsc; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.processor.context.hyperv.instant._seen is None
