"""One emulated processor: Unicorn with its AMD-V, entered by VMRUN once, then run and stopped without a trace.

`run` returns a raw reason; what it means is decided elsewhere. The processor's state is read and written in place
through `state` (see layout.py), the reason and its details through the mailbox (see native_hooks.py).
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from collections.abc import Iterable
from typing import NamedTuple

from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, UC_PROT_EXEC, UC_PROT_READ, Uc, UcError
from unicorn.unicorn_const import (
    UC_HOOK_BLOCK,
    UC_HOOK_INSN,
    UC_HOOK_INTR,
    UC_HOOK_MEM_WRITE_PROT,
)
from unicorn.x86_const import (
    UC_CPU_X86_EPYC,
    UC_X86_INS_IN,
    UC_X86_INS_OUT,
    UC_X86_INS_SYSCALL,
    UC_X86_INS_SYSENTER,
    UC_X86_REG_CR4,
    UC_X86_REG_RAX,
)

from vtl0_guest.cpu import engine_fixes, layout, native_hooks, vmcb
from vtl0_guest.cpu.native_memory import NativeMemory, Piece
from vtl0_guest.cpu.nested import HIDDEN_BASE, NESTED_BASE, REGION_SHIFT, NestedTable
from vtl0_guest.cpu.unicorn_library import CTL_TB_FLUSH, CTL_TLB_FLUSH, EngineUnsupported, address_of, library
from vtl0_guest.cpu.vectors import Vectors
from vtlab.x86.registers import Efer, Msr, Rflags, Vector

# Pages of the hidden range.
_STUB, _VMCB, _HSAVE, _MSR_MAP, _IO_MAP, _PROBE = (HIDDEN_BASE + page * 0x1000 for page in (0, 1, 2, 3, 5, 8))
_HIDDEN_SIZE = 0x10000
_EPYC_SVM = struct.pack("<3B", 0x0F, 0x01, 0xD8)  # vmrun rax

_DR7_OFFSET = -48  # of DR7, from vm_vmcb
_ERROR_CODE_OFFSET = -120  # likewise of the error code; both follow from the order of CPUX86State
_TSC_OFFSET_OFFSET = 8
# From STAR.
_TSC_AUX_OFFSET, _XCR0_OFFSET = 72, 80
# The CPUID words that the translator and helpers consult, u64 each, follow the vendor string and the version.
_VENDOR = b"AuthenticAMD"
_XSAVE_COMPONENTS = len(_VENDOR) + 4 + 21 * 8
_FEATURES_1_ECX, _RDRAND = len(_VENDOR) + 4 + 8, 1 << 30
_PROBE_ERROR = 0x1238
# Of `begin` and `end` in Unicorn's struct hook.
_HOOK_RANGE = 24
_NOWHERE = 0x5A17_0000_0000_0000  # no code is at an address that is not canonical

_RIP, _RFLAGS = layout.RIP // 8, layout.RFLAGS // 8  # in words of 64 bits
_REASON, _DETAIL = native_hooks.REASON // 4, native_hooks.DETAIL // 4  # of 32 bits
_TF = int(Rflags.TF)
# (reason, detail) of stops.
_REQUESTS = frozenset((native_hooks.Reason.EXIT, 0x100 + code) for code in (vmcb.ExitCode.NMI, vmcb.ExitCode.INTERRUPT))
_TRAPPED = (native_hooks.Reason.EXIT, 0x100 + vmcb.ExitCode.EXCEPTION + Vector.DB)

# Creating engines patches and searches process memory; once at a time.
_creation = threading.Lock()


class Region(NamedTuple):
    """Host memory as system-physical memory."""

    base: int
    size: int
    address: int
    writable: bool


# Bytes of host code that an engine keeps before it forgets all of it; blocks that became stale count until then. It
# would take 1 GiB by itself. A stock Linux boots with half of this as fast.
TRANSLATED_CODE = 32 << 20


class Engine:
    """One processor of one level.

    Attributes:
        state: the processor's structure as bytes; offsets in layout.py. Only while the engine is stopped.
        words: the same as 64-bit words.
        vectors: x87 and SSE registers.
        pending: an interrupt may wait; see set_pending.
        counts: all blocks are counted, and `run` returns BUDGET_SPENT after those granted.
    """

    def __init__(self, regions: Iterable[Region], nested: NestedTable, counts: bool = False) -> None:
        """Raises EngineUnsupported if this Unicorn is not the one that the core knows."""
        self.counts = False
        self._set_aside = 0  # granted blocks that come after stop_after()
        with _creation:
            engine_fixes.apply()
            self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
            self._uc.ctl_set_tcg_buffer_size(TRANSLATED_CODE)  # type: ignore[attr-defined]  # absent from its stubs
            self._uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)  # a model without SVM silently drops EFER.SVME
            found = layout.find(self._uc)
        self.layout = found
        self._nested = nested
        self._regions = {region.base >> REGION_SHIFT: region for region in regions}
        self._handle = ctypes.c_void_p(layout.handle_of(self._uc))
        self.state = memoryview((ctypes.c_char * layout.STRUCTURE_SIZE).from_address(found.environment)).cast("B")
        self.words = self.state.cast("Q")
        self._map_memory()
        self._mailbox = (ctypes.c_char * native_hooks.MAILBOX_SIZE)()
        mailbox = memoryview(self._mailbox).cast("B")
        self._mailbox_words = mailbox.cast("I")
        self._mailbox_quads = mailbox.cast("Q")
        self._lines = layout.InterruptLines(found)
        self._stop = self.pending = False
        # Prototypes are given once: arguments made anew cost more than the call.
        self._start = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t
        )(address_of("uc_emu_start"))
        self._tlb_flush_page = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)(
            address_of("tlb_flush_page_x86_64")
        )
        self._invalidate = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)(
            address_of("tb_invalidate_phys_range_x86_64")
        )
        self._enter_guest_mode(nested.root(False))
        self.vectors = Vectors(self._uc, self.state)
        if counts:
            self.watch_blocks(True)
            self.counts = True
            self._close_rdrand()

    # ------------------------------------------------------------------------------------------------ start

    def _map_memory(self) -> None:
        for region in self._regions.values():
            self._uc.mem_map_ptr(region.base, region.size, UC_PROT_ALL, region.address)
            if not region.writable:
                # Mapping without write permission leaves the walker's own A/D updates to fault in the host; taking it
                # away makes the engine drop them.
                self._uc.mem_protect(region.base, region.size, UC_PROT_READ | UC_PROT_EXEC)
        place = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)(
            address_of("qemu_ram_addr_from_host_x86_64")
        )
        self._uc.mem_map_ptr(NESTED_BASE, self._nested.size, UC_PROT_ALL, self._nested.address)
        self._hidden = mmap.mmap(-1, _HIDDEN_SIZE)
        self._hidden_address = ctypes.addressof(ctypes.c_char.from_buffer(self._hidden))
        self._uc.mem_map_ptr(HIDDEN_BASE, _HIDDEN_SIZE, UC_PROT_ALL, self._hidden_address)
        self._exitinfo2 = ctypes.c_uint64.from_address(self._hidden_address + _VMCB - HIDDEN_BASE + vmcb.EXITINFO2)
        hosts = {number: (region.address, region.size) for number, region in self._regions.items()} | {
            NESTED_BASE >> REGION_SHIFT: (self._nested.address, self._nested.size),
            HIDDEN_BASE >> REGION_SHIFT: (self._hidden_address, _HIDDEN_SIZE),
        }
        # The engine keys translated code by its own numbering of host memory.
        pieces = {number: Piece(host, size, place(self._handle, host)) for number, (host, size) in hosts.items()}
        self._code_bases = {number: pieces[number].first for number in self._regions}
        self._memory = NativeMemory(self._uc, self.layout.processor, self._handle.value or 0, pieces)

    def _add_hook(self, kind: int, function: int, *instruction: int, begin: int = 1, end: int = 0) -> int:
        """Returns the handle, which is the address of Unicorn's `struct hook`."""
        handle = ctypes.c_size_t()
        status = library.uc_hook_add(
            self._handle,
            ctypes.byref(handle),
            ctypes.c_int(kind),
            ctypes.c_void_p(function),
            ctypes.c_void_p(ctypes.addressof(self._mailbox)),
            ctypes.c_uint64(begin),
            ctypes.c_uint64(end),
            *(ctypes.c_int(number) for number in instruction),
        )
        if status:
            raise EngineUnsupported(f"Unicorn engine: hook {kind} refused with error {status}")
        return handle.value

    def _install_hooks(self) -> None:
        found = self.layout
        hooks = native_hooks.NativeHooks(
            found.processor,
            found.environment,
            ctypes.addressof(self._mailbox),
            found.environment + self._nested_cr3 * 8,
            self._lines.address,
            self._memory,
        )
        self._hooks = hooks  # the code lives as long as the engine
        self._add_hook(UC_HOOK_INTR, hooks.exit)
        for instruction, function in (
            (UC_X86_INS_IN, hooks.port_in),
            (UC_X86_INS_OUT, hooks.port_out),
            (UC_X86_INS_SYSCALL, hooks.syscall),
            (UC_X86_INS_SYSENTER, hooks.sysenter),
        ):
            self._add_hook(UC_HOOK_INSN, function, instruction)
        # Only where there is something to refuse: stores to pages under such a hook are slow, and the engine compares
        # its range with virtual addresses of code too.
        for region in self._regions.values():
            if not region.writable:
                last = region.base + region.size - 1
                self._add_hook(UC_HOOK_MEM_WRITE_PROT, hooks.store_refused, begin=region.base, end=last)
        # begin and end of the block hook's range: begin > end means everywhere, an address that no code has nowhere.
        handle = self._add_hook(UC_HOOK_BLOCK, hooks.block)
        self._block_range = (ctypes.c_uint64 * 2).from_address(handle + _HOOK_RANGE)
        if tuple(self._block_range) != (1, 0):
            raise EngineUnsupported("Unicorn engine: a hook's range is not where it should be")
        self._watching = True
        layout.replace_tlb_fill(found, hooks.translate)

    def _enter_guest_mode(self, nested_root: int) -> None:
        """VMRUN into a probe whose known fault checks the offsets that have no register to compare with."""
        uc, hidden = self._uc, self._hidden
        probe_root = self._build_probe()
        uc.ctl_exits_enabled(True)  # without an `until` address, whose clean-up would walk the nested table
        uc.ctl_set_exits([])
        first = self._add_hook(UC_HOOK_INTR, address_of("uc_emu_stop"))
        uc.msr_write(Msr.EFER, uc.msr_read(Msr.EFER) | Efer.SVME | Efer.NXE)  # NXE, or nested no-execute is ignored
        uc.msr_write(Msr.VM_HSAVE_PA, _HSAVE)
        uc.reg_write(
            UC_X86_REG_CR4, uc.reg_read(UC_X86_REG_CR4) | 1 << 5
        )  # PAE, or the nested table is read as 2-level
        hidden[0 : len(_EPYC_SVM)] = _EPYC_SVM
        block = vmcb.build(_IO_MAP, _MSR_MAP, probe_root, 0, _PROBE_ERROR)
        hidden[_VMCB - HIDDEN_BASE : _VMCB - HIDDEN_BASE + len(block)] = block
        hidden[_MSR_MAP - HIDDEN_BASE : _MSR_MAP - HIDDEN_BASE + 0x2000] = b"\xff" * 0x2000
        uc.reg_write(UC_X86_REG_RAX, _VMCB)
        uc.emu_start(_STUB, 0)
        self._locate(probe_root)
        if self.error_code != _PROBE_ERROR:
            raise EngineUnsupported(f"Unicorn engine: the probe ended with error {self.error_code:#x}")
        library.uc_hook_del(self._handle, ctypes.c_size_t(first))
        # Once more through the native hooks, with a nested CR3 that only they can put right.
        self._install_hooks()
        self.set_budget(native_hooks.UNLIMITED)
        self.set_roots(probe_root, probe_root)
        self.words[self._nested_cr3] = 0
        self.arm_guards()
        self.flush_code()
        reason = self.run()
        if reason != native_hooks.Reason.EXIT or self.detail != 0x100 + vmcb.ExitCode.EXCEPTION + 13:
            raise EngineUnsupported(
                f"Unicorn engine: the probe ended with {reason} {self.detail:#x} at the native hooks"
            )
        self._check_interrupt_line()
        self.xcr0 = 1
        self._close_xsetbv()
        self.set_roots(nested_root, nested_root)
        self.flush_code()

    def _build_probe(self) -> int:
        """A nested table of one page with a faulting instruction, in the hidden range itself; returns its root."""
        tables = [HIDDEN_BASE + number * 0x1000 for number in (9, 10, 11, 12)]
        for table, target in zip(tables, [*tables[1:], _PROBE], strict=True):
            self._hidden[table - HIDDEN_BASE : table - HIDDEN_BASE + 8] = struct.pack("<Q", target | 0x67)
        self._hidden[_PROBE - HIDDEN_BASE : _PROBE - HIDDEN_BASE + 2] = b"\x8e\xd8"  # mov ds, ax
        return tables[0]

    def _locate(self, probe_root: int) -> None:
        """Finds the fields around the VMCB's address, and checks each by its value."""
        at = bytes(self.state).find(struct.pack("<Q", _VMCB))
        if at < 0 or struct.unpack_from("<Q", self.state, at + _DR7_OFFSET)[0] != 0x400:
            raise EngineUnsupported("Unicorn engine: VMCB address and DR7 are not where they should be")
        self._error_code = at + _ERROR_CODE_OFFSET
        self._intercepts = at + 16
        if struct.unpack_from("<Q", self.state, self._intercepts)[0] != vmcb.INTERCEPTS:
            raise EngineUnsupported("Unicorn engine: the intercepts are not where they should be")
        # intercept, four u16 of CR and DR, exceptions u32 (padded), nested CR3.
        self._nested_cr3 = (self._intercepts + 24) // 8
        if self.words[self._nested_cr3] != probe_root:
            raise EngineUnsupported("Unicorn engine: the nested CR3 is not where it should be")
        self._tsc_offset = (at + _TSC_OFFSET_OFFSET) // 8
        star = self.layout.msrs[Msr.STAR]
        self._tsc_aux, self._xcr0 = (star + _TSC_AUX_OFFSET) // 8, (star + _XCR0_OFFSET) // 8
        if self.words[self._xcr0] != 3 or self.words[self._tsc_offset] != 0:
            raise EngineUnsupported("Unicorn engine: XCR0 and the TSC offset are not where they should be")

    def _check_interrupt_line(self) -> None:
        """A request must end the run at once, as the exit that AMD-V gives it."""
        self.set_stop()
        reason = self.run()
        self.clear_stop()
        if reason != native_hooks.Reason.EXIT or self.detail != 0x100 + vmcb.ExitCode.NMI:
            raise EngineUnsupported("Unicorn engine: the interrupt request is not where it should be")

    def _close_xsetbv(self) -> None:
        """Takes all components from the engine's CPUID leaf 0xD, so that each XSETBV faults and the core decides."""
        at = bytes(self.state).find(_VENDOR)
        if at < 0:
            raise EngineUnsupported("Unicorn engine: the CPUID words are not in the processor's structure")
        components = at + _XSAVE_COMPONENTS
        if struct.unpack_from("<Q", self.state, components)[0] & 3 != 3:
            raise EngineUnsupported("Unicorn engine: the XSAVE components are not where they should be")
        struct.pack_into("<QQ", self.state, components, 0, 0)

    def _close_rdrand(self) -> None:
        """Makes RDRAND and RDSEED #UD in blocks translated from now on: the core gives numbers that repeat."""
        word = bytes(self.state).find(_VENDOR) + _FEATURES_1_ECX
        features = struct.unpack_from("<Q", self.state, word)[0]
        if not features & _RDRAND:
            raise EngineUnsupported("Unicorn engine: the CPUID words of leaf 1 are not where they should be")
        struct.pack_into("<Q", self.state, word, features & ~_RDRAND)

    # ------------------------------------------------------------------------------------------------- running

    def arm_guards(self) -> None:
        """Takes the present CR3 and TR as the ones that only a task switch would change."""
        self._mailbox_quads[native_hooks.GUARD_CR3 // 8] = self.words[(layout.CR + 24) // 8]
        self._mailbox_quads[native_hooks.GUARD_TR // 8] = self.words[
            (layout.SEGMENTS + 7 * layout.SEGMENT_SIZE + 8) // 8
        ]

    def watch_blocks(self, on: bool) -> None:
        """Switches the block hook for blocks translated from now on.

        It is on outside long mode, where hardware task switches exist. Blocks of long mode and of the others are never
        mixed up, since EFER.LMA is part of a block's key.
        """
        if on != self._watching and not self.counts:
            self._watching = on
            self._block_range[0], self._block_range[1] = (1, 0) if on else (_NOWHERE, _NOWHERE)

    def run(self) -> int:
        """Runs from the present RIP until something stops it; returns native_hooks.Reason. The GIL is released.

        Raises UcError for what no hook explains: the caller stops the processor.
        """
        words = self._mailbox_words
        words[_REASON] = 0
        if self.pending:
            self._lines.raise_interrupt()
        if self._stop:
            self._lines.raise_nmi()
        status = self._start(self._handle, self.words[_RIP], 0, 0, 0)
        reason = words[_REASON]
        if status and not reason:
            raise UcError(status)
        return reason

    def step(self, trap: bool = True) -> bool:
        """Runs one instruction, or one element of a string instruction with REP, whatever is asked for meanwhile.

        Returns whether it was done; if not, what stopped it is to be found as after `run`.

        Args:
            trap: stop behind it by RFLAGS.TF, which it may neither show nor change. Else by counting blocks: the
                instruction is one that ends a block, and translated code is forgotten.
        """
        words, state = self._mailbox_words, self.words
        before, budget = state[_RFLAGS] & _TF, self._mailbox_quads[native_hooks.BUDGET // 8]
        watching, done = self._watching, _TRAPPED if trap else (native_hooks.Reason.BUDGET_SPENT, 0)
        if not trap:
            self.watch_blocks(True)
            self.flush_code()
        while True:
            self.set_budget(native_hooks.UNLIMITED if trap else 1)
            self._lines.lower_interrupt()
            self._lines.lower_nmi()
            words[_REASON] = words[_DETAIL] = 0
            if trap:
                state[_RFLAGS] |= _TF
            status = self._start(self._handle, state[_RIP], 0, 0, 0)
            state[_RFLAGS] = state[_RFLAGS] & ~_TF | before
            if status and not words[_REASON]:
                raise UcError(status)
            if (words[_REASON], words[_DETAIL]) not in _REQUESTS:
                break
        self.set_budget(budget)
        if not trap:
            self.watch_blocks(watching)
        return (words[_REASON], words[_DETAIL]) == done

    @property
    def reason(self) -> int:
        """What `run` returned last, or why `step` failed."""
        return self._mailbox_words[_REASON]

    @property
    def detail(self) -> int:
        """Exit number or port."""
        return self._mailbox_words[_DETAIL]

    @property
    def error_code(self) -> int:
        """Low 32 bits of EXITINFO1: the error code of an exception, the access bits of a nested fault."""
        return int.from_bytes(self.state[self._error_code : self._error_code + 4], "little")

    @property
    def fault_address(self) -> int:
        """EXITINFO2: linear address of #PF, guest-physical address of a nested fault."""
        return self._exitinfo2.value

    @property
    def port_size(self) -> int:
        """Bytes of the port access or refused store."""
        return self._mailbox_words[native_hooks.SIZE // 4]

    @property
    def value(self) -> int:
        """Value of the port write or refused store."""
        return self._mailbox_quads[native_hooks.VALUE // 8]

    @property
    def address(self) -> int:
        """System-physical address of the refused store."""
        return self._mailbox_quads[native_hooks.ADDRESS // 8]

    def intercept(self, code: int, on: bool) -> None:
        """Switches one of the instruction intercepts (exit codes 0x60 to 0x9F)."""
        word = self._intercepts // 8
        bit = 1 << (code - 0x60)
        self.words[word] = self.words[word] | bit if on else self.words[word] & ~bit

    @property
    def tsc_offset(self) -> int:
        """What RDTSC adds to the host's counter, modulo 2**64."""
        return self.words[self._tsc_offset]

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self.words[self._tsc_offset] = value

    def set_tsc_aux(self, value: int) -> None:
        """What RDTSCP and RDPID give."""
        self.words[self._tsc_aux] = value

    @property
    def xcr0(self) -> int:
        return self.words[self._xcr0]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.words[self._xcr0] = value

    def set_stop(self) -> None:
        """Makes `run` end with the exit NMI at the next block. From any thread; holds until cleared.

        Where blocks are counted only the next `run`: a block that a request breaks off would count twice.
        """
        self._stop = True
        if not self.counts:
            self._lines.raise_nmi()

    def clear_stop(self) -> None:
        self._stop = False
        self._lines.lower_nmi()

    def set_pending(self, waiting: bool) -> None:
        """Makes `run` end with the exit INTERRUPT as soon as an interrupt can be taken. From any thread."""
        self.pending = waiting
        if waiting:
            self._lines.raise_interrupt()
        else:
            self._lines.lower_interrupt()

    def set_budget(self, blocks: int) -> None:
        """Blocks that `run` may start before it returns BUDGET_SPENT; counted while `watch_blocks` is on."""
        self._mailbox_quads[native_hooks.BUDGET // 8] = blocks

    @property
    def _budget(self) -> int:
        left = self._mailbox_quads[native_hooks.BUDGET // 8]
        return left if left <= native_hooks.UNLIMITED else 0  # -1: one was asked for that was not there

    def grant(self, blocks: int) -> None:
        """So many blocks may run from now on. Where `counts`."""
        self._set_aside = 0
        self.set_budget(blocks)

    @property
    def blocks_left(self) -> int:
        """Of those granted."""
        return self._budget + self._set_aside

    def stop_after(self, blocks: int) -> None:
        """Makes `run` return BUDGET_SPENT when it has run so many blocks, whatever was granted."""
        if self.counts:
            left = self.blocks_left
            blocks = min(blocks, left)
            self._set_aside = left - blocks
        self.set_budget(blocks)

    def stop_no_more(self) -> None:
        """Ends stop_after()."""
        left = self.blocks_left
        self._set_aside = 0
        self.set_budget(left if self.counts else native_hooks.UNLIMITED)

    @property
    def spent(self) -> bool:
        """All blocks that were granted have run."""
        return self.counts and not self.blocks_left

    # ----------------------------------------------------------------------------------------------- translation

    def set_roots(self, kernel: int, user: int) -> None:
        """Nested roots from the next translation on, below CPL3 and at CPL3."""
        self._mailbox_quads[native_hooks.KERNEL_ROOT // 8] = kernel
        self._mailbox_quads[native_hooks.USER_ROOT // 8] = user

    @property
    def roots(self) -> tuple[int, int]:
        """What set_roots() was given."""
        quads = self._mailbox_quads
        return quads[native_hooks.KERNEL_ROOT // 8], quads[native_hooks.USER_ROOT // 8]

    def flush_translations(self) -> None:
        """Forgets all address translations, guest and nested."""
        library.uc_ctl(self._handle, CTL_TLB_FLUSH)

    def flush_page(self, linear: int) -> None:
        """Forgets the translation of one page."""
        self._tlb_flush_page(self.layout.processor, linear)

    def invalidate_pages(self, frame: int, count: int) -> None:
        """Forgets translated code of `count` pages from a system-physical address: somebody else wrote to them."""
        base = self._code_bases.get(frame >> REGION_SHIFT)
        if base is not None:
            start = base + (frame & (1 << REGION_SHIFT) - 1)
            if self._memory.holds_code(start, count):
                self._invalidate(self._handle, start, start + count * 0x1000)

    def flush_code(self) -> None:
        """Forgets all translated code. Each block costs about 2.5 µs again."""
        library.uc_ctl(self._handle, CTL_TB_FLUSH)
        library.uc_ctl(self._handle, CTL_TLB_FLUSH)

    def close(self) -> None:
        self._memory.close()
        self.state.release()
        self.words.release()
        del self._uc, self.vectors  # the engine goes now, and not when the collector looks
