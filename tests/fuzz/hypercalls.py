"""A hostile VTL0 at the hypercall layer: a board as the VMM has it, VTL1 in place, and calls of any kind.

After each call the status is one that the table has for it; every now and then VTL1's pages and those that it sealed
are compared with what they were, through the files themselves.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.target import Defect, Target
from tests.unit.vmm.fakes import FakeLevel
from vmm import designs
from vmm.board import Board
from vmm.devices.bus import PortBus
from vmm.events import EventLog
from vmm.gate import Gate
from vmm.hypercalls import HYPERCALLS
from vmm.hyperv_msrs import SyntheticMsrs
from vmm.memory import Memory
from vmm.processor import Processor
from vmm.vtl import PartitionVtl, VpVtl
from vtlab.errors import VtlabError
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import ANY_VP, PARTITION_SELF, VP_SELF, HypercallCode, encode_input_value
from vtlab.hyperv.profiles import PROFILES
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.status import HvStatus
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, Hypercall, PageAccess, ProtectionUpdate
from vtlab.v1.vmm_pb2 import MachineSpec

RAM = 2 << 20
VPS = 4
INPUT, OUTPUT = 0x10000, 0x20000
PRIVATE, SEALED = range(0x80, 0x90), range(0x90, 0xA0)
PATTERN = bytes(range(256)) * (PAGE_SIZE // 256)
RENEW_AFTER = 50_000
CHECK_EVERY = 1_000
# A vCPU that is not entered takes no updates; so many may wait for it, whatever the others send.
MOST_WAITING = 4_096

_CODES = [*HypercallCode]
_NAMES = [int(name) for name in HvRegister]
_EDGES = [0, 1, 2, 3, 7, 8, 0xF, 0x10, 0x20, 0xFF, 0xFFF, 0x1000, VPS - 1, VPS, 63, 64, 65, 1 << 31, (1 << 32) - 1]
_EDGES += [1 << 32, 1 << 40, 1 << 52, 1 << 63, (1 << 64) - 1, PARTITION_SELF, VP_SELF, ANY_VP]
_EDGES += [page * PAGE_SIZE for page in (PRIVATE[0], SEALED[0], RAM // PAGE_SIZE - 1, RAM // PAGE_SIZE)]
_WORDS = [(word % (1 << 64)).to_bytes(8, "little") for word in (*_EDGES, *_NAMES, *_NAMES)]
_WORDS += [((1 << bits) - 1).to_bytes(8, "little") for bits in range(64)]
_WORDS += [first.to_bytes(4, "little") + second.to_bytes(4, "little") for first, second in itertools.pairwise(_NAMES)]
_RESULT_BITS = 0xFFFF | 0xFFF << 32


class HypercallTarget(Target):
    """Calls by VTL0's vCPUs, in turn."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        self._boards = 0
        self._calls = 0
        self.board: Board | None = None
        self._statuses: set[tuple[int, HvStatus]] = set()
        self._known: set[int] = set()

    def close(self) -> None:
        if self.board is not None:
            self.board.memory.close()
        self._folder.cleanup()

    def renew(self, profile: str, personality: vcpu_pb2.Personality.ValueType, *, vtl1: bool = True) -> Board:
        """Another machine; VTL1 has private and sealed pages, filled with a pattern."""
        if self.board is not None:
            self.check()
            self.board.memory.close()
        self._boards += 1
        folder = Path(self._folder.name) / str(self._boards)
        folder.mkdir()
        self.board = board = _board(folder, profile, personality, vtl1=vtl1)
        self._statuses = HYPERCALLS.statuses(profile)
        self._known = {code for code, _ in self._statuses}
        return board

    def step(self, rng: random.Random) -> str:
        if self._calls % RENEW_AFTER == 0:
            personality = rng.choice((vcpu_pb2.PERSONALITY_POLICY, vcpu_pb2.PERSONALITY_GUEST_CODE))
            self.renew(rng.choice(sorted(PROFILES)), personality, vtl1=rng.random() < 0.8)
        elif self._calls % CHECK_EVERY == 0:
            self.check()
        self._calls += 1
        return self.call(rng, rng.randrange(VPS))

    def call(self, rng: random.Random, vp_index: int) -> str:
        """One call of VTL0 on that vCPU."""
        assert self.board is not None
        value, fast = _value(rng)
        data = _content(rng, value & 0xFFFF)
        request = Request(value, _gpa(rng, INPUT), _gpa(rng, OUTPUT), 0, rng.random() < 0.8)
        if fast:
            low, high = (int.from_bytes(data[at : at + 8], "little") for at in (0, 8))
            request = request._replace(input=low, output=high)
        else:
            self._put(request.input, data)
        exit_ = Exit(hypercall=Hypercall(xmm=data[16:112] if fast and rng.random() < 0.7 else b""))
        return self.serve(request, exit_, vp_index)

    def serve(self, request: Request, exit_: Exit, vp_index: int) -> str:
        """Serves a call and judges its answer."""
        board = self.board
        assert board is not None
        code = request.value & 0xFFFF
        result = HYPERCALLS.serve(board, board.processors[vp_index], 0, exit_, request)
        if result is None:
            return "again"
        if result & ~_RESULT_BITS:
            raise Defect(f"{request}: result {result:#x}")
        try:
            status = HvStatus(result & 0xFFFF)
        except ValueError:
            raise Defect(f"{request}: status {result & 0xFFFF:#x} is none") from None
        if code not in self._known:
            right = status is HvStatus.INVALID_HYPERCALL_CODE
        else:
            right = (code, status) in self._statuses or status is board.profile.reserved_input_bits
        if not right:
            raise Defect(f"{request}: call {code:#x} gives {status!r}, which its row does not have")
        if result >> 32 > max(request.value >> 32 & 0xFFF, request.value >> 48 & 0xFFF):
            raise Defect(f"{request}: {result >> 32} elements are done")
        return status.name

    def drain(self, vp_index: int) -> int:
        """That vCPU is entered, and takes what waits for it at both levels; returns how much it was."""
        assert self.board is not None
        processor = self.board.processors[vp_index]
        waiting = processor.waiting
        for vtl in (0, 1):
            processor._take_waiting(vcpu_pb2.Enter(), vtl)
        return waiting

    def check(self) -> None:
        board = self.board
        assert board is not None
        for vp_index, processor in enumerate(board.processors):
            if processor.waiting > MOST_WAITING:
                raise Defect(f"{processor.waiting} updates wait for vCPU {vp_index}")
            self.drain(vp_index)
        files = board.memory._ram.views
        for pages, file in ((PRIVATE, RamFile.PRIVATE), (SEALED, RamFile.SEALED)):
            for page in pages:
                if files[file][page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != PATTERN:
                    raise Defect(f"page {page:#x} of {file.value} changed")
        for page in PRIVATE:
            if any(files[RamFile.WRITABLE][page * PAGE_SIZE : (page + 1) * PAGE_SIZE]):
                raise Defect(f"page {page:#x}, which is VTL1's, appears in {RamFile.WRITABLE.value}")
        for processor in board.processors:
            if processor.vtl.active:
                raise Defect(f"vCPU {processor.index} went to VTL{processor.vtl.active}")

    def _put(self, gpa: int, data: bytes) -> None:
        """VTL0 writes its input where it may; elsewhere the call finds what is there."""
        assert self.board is not None
        try:
            self.board.memory.write(gpa, data[: PAGE_SIZE - gpa % PAGE_SIZE], vtl=0)
        except VtlabError:
            return


def _board(folder: Path, profile: str, personality: vcpu_pb2.Personality.ValueType, *, vtl1: bool) -> Board:
    spec = MachineSpec(ram_size=RAM, vp_count=VPS, vtl1=True, vsm_profile=profile, personality=personality)
    guest, monitor = FakeLevel(0), FakeLevel(1)
    memory = Memory(folder, RAM, lambda pages: None)
    gate = Gate(VPS, guest.kick)
    partition = PartitionVtl(True, enabled=3 if vtl1 else 1)
    msrs, design = SyntheticMsrs(memory), designs.create(spec)
    board = Board("vm", spec, memory, EventLog("vm"), gate, guest, monitor, partition, msrs, PortBus([]), design)
    board.profile = PROFILES[profile]
    for index in range(VPS):
        enabled = 3 if vtl1 and index < VPS - 1 else 1
        board.processors.append(Processor(index, guest, monitor, gate, VpVtl(enabled=enabled)))
    for pages in (PRIVATE, SEALED):
        memory.write(pages[0] * PAGE_SIZE, PATTERN * len(pages), vtl=1)
    private, sealed = vcpu_pb2.PAGE_STORE_PRIVATE, vcpu_pb2.PAGE_STORE_SEALED
    memory.apply(ProtectionUpdate(runs=[PRIVATE[0], len(PRIVATE)], access=PageAccess(), store=private))
    access = PageAccess(read=True, kernel_execute=True)
    memory.apply(ProtectionUpdate(runs=[SEALED[0], len(SEALED)], access=access, store=sealed))
    return board


def _value(rng: random.Random) -> tuple[int, bool]:
    """The input value: mostly as the call wants it, so that the call itself is reached."""
    code = int(rng.choice(_CODES)) if rng.random() < 0.97 else rng.getrandbits(16)
    fast = rng.random() < 0.3
    row = HYPERCALLS._rows.get(code)
    if row is not None and rng.random() < 0.85:
        count = rng.choice((1, 1, 1, 2, 3, 8)) if row.shape.rep else 0
        header = rng.choice((0, 1, 2)) if row.shape.variable else 0
        start = 0
    else:
        count = rng.choice((0, 0, 1, 1, 2, 3, 16, 255, 510, 4095))
        start = rng.choice((0, 0, 0, 0, 1, count, 4095))
        header = rng.choice((0, 0, 0, 0, 1, 2, 8, 1023))
    value = encode_input_value(code, fast=fast, variable_header=header, rep_count=count, rep_start=start)
    if rng.random() < 0.02:
        value ^= 1 << rng.randrange(64)
    return value, bool(value >> 16 & 1)


def _gpa(rng: random.Random, usual: int) -> int:
    """A buffer: mostly where a kernel has one; else across a page, unaligned, VTL1's, sealed, or no RAM."""
    kind = rng.random()
    if kind < 0.7:
        return usual
    if kind < 0.75:
        return usual + PAGE_SIZE - rng.randrange(1, 256)
    if kind < 0.85:
        return int(rng.choice((*PRIVATE, *SEALED))) * PAGE_SIZE + rng.choice((0, 0, 8, PAGE_SIZE - 16))
    if kind < 0.9:
        return usual + rng.randrange(1, 8)
    if kind < 0.95:
        return rng.choice((PRIVATE[0], SEALED[0], SEALED[-1] + 1)) * PAGE_SIZE - rng.randrange(0, 64, 8)
    return rng.choice((RAM - 8, RAM, 1 << 40, 1 << 52, (1 << 64) - 8, rng.getrandbits(64)))


def _content(rng: random.Random, code: int) -> bytes:
    """Input of a call, often right; then register names, edges and noise."""
    usual = _BEGINNINGS.get(code, _for_a_vp)
    words = usual(rng) if rng.random() < 0.9 else [rng.choice(_EDGES), rng.getrandbits(64)]
    head = b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words)
    size = rng.choice((2, 4, 12, 28, 64))
    return head + (rng.randbytes(8 * size) if rng.random() < 0.2 else b"".join(rng.choices(_WORDS, k=size)))


def _for_a_vp(rng: random.Random) -> list[int]:
    """A partition, then a vCPU and a level."""
    partition = PARTITION_SELF if rng.random() < 0.9 else rng.choice(_EDGES)
    vp_index = rng.choice((VP_SELF, VP_SELF, 0, 1, VPS - 1, VPS, ANY_VP, rng.getrandbits(32)))
    return [partition, vp_index & 0xFFFF_FFFF | rng.choice((0, 0, 0, 0x10, 0x11, 1, 0xFF)) << 32]


def _for_an_ipi(rng: random.Random) -> list[int]:
    """A vector and a level; then a mask, or the format of a set of vCPUs and its banks."""
    vector = rng.choice((0, 15, 16, 0x20, 0xFF, 0x100, rng.getrandbits(32)))
    return [vector | rng.choice((0, 0, 0, 0x10, 0x11)) << 32, *_vps(rng)]


def _for_a_flush(rng: random.Random) -> list[int]:
    return [rng.choice(_EDGES), rng.choice((0, 1, 2, 3, 4, rng.getrandbits(64))), *_vps(rng)]


def _vps(rng: random.Random) -> list[int]:
    """What a mask, or the head of a sparse set, can be: right, of absent vCPUs, with more banks than are there."""
    masks = (0, 1, 0b10, (1 << VPS) - 1, 1 << VPS, 1 << 63, rng.getrandbits(64))
    return rng.choice(([rng.choice(masks)], [rng.choice((0, 0, 1, 2, rng.getrandbits(64))), *rng.choices(masks, k=3)]))


def _for_a_message(rng: random.Random) -> list[int]:
    """A connection, the type of the message, and its size."""
    kind = rng.choice((1, 0x7FFF_FFFF, 0x8000_0000, 0))
    return [rng.choice((*range(6), rng.getrandbits(32))), kind | rng.choice((0, 8, 240, 241, 0xFFFF_FFFF)) << 32]


_BEGINNINGS: dict[int, Callable[[random.Random], list[int]]] = {
    HypercallCode.SEND_SYNTHETIC_CLUSTER_IPI: _for_an_ipi,
    HypercallCode.SEND_SYNTHETIC_CLUSTER_IPI_EX: _for_an_ipi,
    HypercallCode.FLUSH_VIRTUAL_ADDRESS_SPACE: _for_a_flush,
    HypercallCode.FLUSH_VIRTUAL_ADDRESS_LIST: _for_a_flush,
    HypercallCode.FLUSH_VIRTUAL_ADDRESS_SPACE_EX: _for_a_flush,
    HypercallCode.FLUSH_VIRTUAL_ADDRESS_LIST_EX: _for_a_flush,
    HypercallCode.POST_MESSAGE: _for_a_message,
    HypercallCode.SIGNAL_EVENT: _for_a_message,
}
