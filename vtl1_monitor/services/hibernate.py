"""HIBERNATE and RESTORE: a machine that is off keeps what VTL0 was held to.

The kernel copies its memory for a disk; VTL1 seals the copy, compares it with what it guards, and gives its own part,
encrypted. The next kernel of the machine, before it asks for anything, has VTL1 look at what the disk held. VTL1 puts
memory, rights, rules and the processor back itself, with all memory closed meanwhile: no instruction of VTL0 runs
between the call and the restored state. Of what is not the image that was sealed last, nothing is used: RESET.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vtl1_monitor import rights, snapshot
from vtl1_monitor.hibernation import BadImage, Image, Kept, read_image, seal, unseal
from vtl1_monitor.machine import Machine, Processor
from vtl1_monitor.policy.schema import Hibernate
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.steps import Steps, protect
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.services import HIBERNATION_HEADER, HIBERNATION_MAGIC, MAX_HIBERNATION_STATE
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Msr

OWNER = "hibernation image"
_CLOSED = "restore"
_READ_ONLY = rights.READ | rights.SEALED
_FILES = {rights.WRITABLE: RamFile.WRITABLE, rights.SEALED: RamFile.SEALED, rights.PRIVATE: RamFile.PRIVATE}
# Restored with those that the policy has rules about. Others are the kernel's to set anew, as after every start.
_MSRS = frozenset(
    {
        *(Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.STAR, Msr.LSTAR, Msr.CSTAR, Msr.SFMASK),
        *(Msr.FS_BASE, Msr.GS_BASE, Msr.KERNEL_GS_BASE, Msr.PAT),
    }
)


def hibernate(call: Call) -> Steps:
    """(pa, pages), or (0) to go on instead. On refusal the pages are ordinary memory again."""
    machine = call.machine
    yield from _go_on(machine)
    if not call.first:
        return 0
    if machine.rules.lifecycle.hibernate is Hibernate.REFUSE:
        raise Refused(errno.EPERM, "the policy refuses to hibernate")
    if not machine.end_of_boot:
        raise Refused(errno.EPERM, "boot has not ended")
    run = _run(call)
    if not machine.is_ordinary(run):
        raise Refused(errno.EACCES, f"image at {call.first:#x} is not ordinary memory")
    yield vcpu_pb2.StateRequest()
    before = snapshot.dump(machine)
    yield from protect(machine.memory, [Change(run, _READ_ONLY, OWNER)])
    try:
        size = _seal(call, run, before)
    except BadImage as error:
        yield from protect(machine.memory, [machine.ordinary(run)])
        raise Refused(errno.EBADMSG, str(error)) from None
    machine.hibernation = run
    return size


def restore(call: Call) -> Steps:
    """(pa, pages). What was tried and is not the image is a RESET."""
    machine, memory = call.machine, call.machine.memory
    if machine.taken:
        raise Refused(errno.EPERM, "a policy was taken")
    run = _run(call)
    if any(code & rights.STORE_MASK == rights.PRIVATE for code in memory.codes_in(run) or {rights.PRIVATE}):
        raise Refused(errno.EINVAL, f"image at {call.first:#x} is not in RAM")
    yield from protect(memory, [Change(run, _READ_ONLY, OWNER)])
    try:
        image = read_image(_sealed(machine, run), memory.pages)
        kept = _verified(machine, image)
    except BadImage as error:
        reason = f"hibernation image: {error}"
        call.resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_RESET, reason=reason)
        machine.break_down(reason)
        raise Refused(errno.EBADMSG, reason) from None
    codes, _ = snapshot.pages_of(machine, kept.machine)
    closed = [Change(run, code & rights.STORE_MASK, _CLOSED) for run, code in _runs(codes)]
    yield from protect(memory, closed)
    for number, page in [*zip(image.numbers, _pages(image), strict=True), *kept.own.items()]:
        view = memory.ram.views[_FILES[codes[number] & rights.STORE_MASK]]
        view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = page
    opened = memory.protect_message([Change(run, code, _CLOSED) for run, code in _runs(codes)])
    snapshot.load(machine, kept.machine)
    machine.processors = [Processor(locked=one.locked) for one in machine.processors]
    machine.filter_changed()
    call.updates += [vcpu_pb2.Update(protection=one) for one in opened.protections] if opened is not None else []
    call.updates.append(vcpu_pb2.Update(invalidate_code=vcpu_pb2.InvalidateCode()))
    state = registers_pb2.ProcessorState.FromString(kept.processor)
    call.updates.append(vcpu_pb2.Update(start_processor=vcpu_pb2.StartProcessor(state=state)))
    call.parks_others = True
    reason = "hibernation image: verified, and the machine is as it was"
    resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason)
    machine.verdicts.record(call.as_exit(), resolution, "hibernate")
    return 0


def _run(call: Call) -> Run:
    """The image's pages. Raises Refused (-EINVAL)."""
    run = Run(call.first // PAGE_SIZE, call.second)
    if call.first % PAGE_SIZE or not 0 < run.pages <= call.machine.memory.pages or run.end > call.machine.memory.pages:
        raise Refused(errno.EINVAL, f"image of {call.second} pages at {call.first:#x}")
    return run


def _go_on(machine: Machine) -> Steps:
    """Nothing will be restored; the copy that was sealed is VTL0's again."""
    machine.tickets.void(machine.vm)
    run, machine.hibernation = machine.hibernation, None
    if run is not None:
        yield from protect(machine.memory, [machine.ordinary(run)])
    return 0


def _seal(call: Call, run: Run, before: bytes) -> int:
    """Writes VTL1's state behind the pages; its size. Raises BadImage."""
    machine, memory = call.machine, call.machine.memory
    image = read_image(_sealed(machine, run), memory.pages)
    _check(machine, image, run)
    kept = Kept(
        image_sha256=machine.image.sha256,
        ram_size=memory.size,
        vp_count=len(machine.processors),
        machine=before,
        processor=_processor(call, image).SerializeToString(),
        own=dict(_own(machine, image, run)),
        digest=image.digest,
    )
    state = seal(snapshot.dump_value(kept), machine.vm, machine.tickets.issue(machine.vm))
    room = (run.pages - image.state_page) * PAGE_SIZE
    if len(state) > min(room, MAX_HIBERNATION_STATE):
        machine.tickets.void(machine.vm)
        raise BadImage(f"{room} bytes behind the pages are too few: {len(state)}")
    start = run.first * PAGE_SIZE
    memory.write_sealed(start + image.state_page * PAGE_SIZE, state)
    header = HIBERNATION_HEADER.pack(HIBERNATION_MAGIC, len(image.numbers), len(state), image.rip, image.rsp)
    memory.write_sealed(start, header)
    return len(state)


def _check(machine: Machine, image: Image, run: Run) -> None:
    """What VTL1 guards is copied as it is, and nothing that VTL0 may not read. Raises BadImage."""
    codes, sealed = machine.memory.codes, machine.memory.ram.views[RamFile.SEALED]
    for position, number in enumerate(image.numbers):
        code = codes[number]
        if run.first <= number < run.end or not code & rights.READ:
            raise BadImage(f"page {number:#x} cannot be kept by VTL0")
        guarded = code & rights.STORE_MASK == rights.SEALED
        if guarded and sealed[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] != image.page(position):
            raise BadImage(f"the copy of page {number:#x} is not what VTL1 guards there")


def _own(machine: Machine, image: Image, run: Run) -> Iterator[tuple[int, bytes]]:
    """Pages that VTL1 keeps itself: that VTL0 may not read, and what it left out of those that it may not write."""
    kept = {*image.numbers, *range(run.first, run.end)}
    for number, code in enumerate(machine.memory.codes):
        if code & rights.STORE_MASK != rights.WRITABLE and number not in kept:
            view = machine.memory.ram.views[_FILES[code & rights.STORE_MASK]]
            yield number, view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


def _verified(machine: Machine, image: Image) -> Kept:
    """What was sealed with that image; it can be restored once. Raises BadImage."""
    number, key = machine.tickets.last(machine.vm), machine.tickets.take(machine.vm)
    kept = snapshot.load_value(unseal(image.state, machine.vm, number, key), Kept)
    own = (machine.image.sha256, machine.memory.size, len(machine.processors))
    if own != (kept.image_sha256, kept.ram_size, kept.vp_count):
        raise BadImage("the machine has another boot image, RAM or number of vCPUs")
    if image.digest != kept.digest:
        raise BadImage("its pages are not those that were sealed")
    text = machine.override.text if machine.override is not None else None
    if text is not None and text != snapshot.override_of(machine, kept.machine):
        raise BadImage("the operator has set another policy meanwhile")
    return kept


def _processor(call: Call, image: Image) -> registers_pb2.ProcessorState:
    """vCPU 0 where the kernel wants to go on, with all else as it is now."""
    state = registers_pb2.ProcessorState()
    state.CopyFrom(call.state)
    state.registers.rip, state.registers.rsp = image.rip, image.rsp
    wanted = _MSRS | set(call.machine.rules.msrs)
    msrs = [one for one in call.state.msrs if one.index in wanted]
    del state.msrs[:]
    state.msrs.extend(msrs)
    return state


def _sealed(machine: Machine, run: Run) -> bytes:
    return machine.memory.sealed(run.first * PAGE_SIZE, run.pages * PAGE_SIZE)


def _pages(image: Image) -> Iterator[bytes]:
    return (image.page(position) for position in range(len(image.numbers)))


def _runs(codes: bytes) -> Iterator[tuple[Run, int]]:
    """Adjacent pages of the same code."""
    first = 0
    for number in range(1, len(codes) + 1):
        if number == len(codes) or codes[number] != codes[first]:
            yield Run(first, number - first), codes[first]
            first = number
