"""Which changes exit: the filter of vcpu.proto as pure decisions on values."""

from __future__ import annotations

from vtlab.v1 import registers_pb2, vcpu_pb2

# CR3 without PCID and flags.
_CR3_BASE = 0x000F_FFFF_FFFF_F000
_ALL = (1 << 64) - 1
# What a secure intercept gives no mask for.
_WITHOUT_MASK = (registers_pb2.REGISTER_NAME_EFER, registers_pb2.REGISTER_NAME_XFEM)


class Intercepts:
    """One InterceptFilter, made fast to ask.

    Attributes:
        startup_window: SIPI opens a window.
    """

    def __init__(self, message: vcpu_pb2.InterceptFilter | None = None) -> None:
        self._message = message = message or vcpu_pb2.InterceptFilter()
        self._masks = {
            registers_pb2.REGISTER_NAME_CR0: message.cr0_mask,
            registers_pb2.REGISTER_NAME_CR4: message.cr4_mask,
            registers_pb2.REGISTER_NAME_EFER: message.efer_mask,
            registers_pb2.REGISTER_NAME_XFEM: message.xcr0_mask,
        }
        self._pinned = {
            registers_pb2.REGISTER_NAME_CR0: message.cr0_pinned,
            registers_pb2.REGISTER_NAME_CR4: message.cr4_pinned,
        }
        self._unchanged = message.unchanged_writes
        self._cr3_writes = message.cr3_writes
        self._cr3_targets = frozenset(target & _CR3_BASE for target in message.cr3_targets)
        self._tables = {
            registers_pb2.REGISTER_NAME_GDTR: message.gdtr_writes,
            registers_pb2.REGISTER_NAME_IDTR: message.idtr_writes,
            registers_pb2.REGISTER_NAME_LDTR: message.ldtr_writes,
            registers_pb2.REGISTER_NAME_TR: message.tr_writes,
        }
        self._msr_writes: dict[int, int] = {}
        for entry in message.msr_writes:
            self._msr_writes[entry.index] = self._msr_writes.get(entry.index, 0) | entry.mask
        self._msr_reads = [range(item.first, item.first + item.count) for item in message.msr_reads]
        self._ports = [range(item.first, item.first + item.count) for item in message.ports]
        self.state_loads, self.no_smi = message.state_loads, message.no_smi
        self.cpuid, self.hlt, self.invlpg = message.cpuid, message.hlt, message.invlpg
        self.user_hypercalls = message.user_hypercalls
        self.startup_window = message.startup_window

    def inside_smm(self) -> Intercepts:
        """What of it holds in SMM: no pin of a register, table or MSR, but those of a filter that knows no SMM."""
        kept = vcpu_pb2.InterceptFilter(ports=self._message.ports, no_smi=self.no_smi)
        kept.cpuid, kept.hlt, kept.invlpg = self.cpuid, self.hlt, self.invlpg
        kept.user_hypercalls = self.user_hypercalls
        kept.cr0_pinned, kept.cr4_pinned = self._message.cr0_pinned, self._message.cr4_pinned
        return Intercepts(kept)

    def inside_window(self) -> Intercepts:
        """What of it holds between SIPI and the end of the window: all but the pins of what INIT clears."""
        kept = vcpu_pb2.InterceptFilter()
        kept.CopyFrom(self._message)
        kept.cr0_mask = kept.cr0_pinned = kept.cr4_mask = kept.cr4_pinned = kept.efer_mask = 0
        kept.cr3_writes = kept.gdtr_writes = kept.idtr_writes = kept.ldtr_writes = kept.tr_writes = False
        return Intercepts(kept)

    def register_write(self, name: registers_pb2.RegisterName.ValueType, old: int, new: int) -> bool:
        """CR0, CR4, EFER, XCR0: does a watched bit change, or would a pinned one be clear?"""
        mask = self._masks[name]
        if (old ^ new) & mask or ~new & self._pinned.get(name, 0):
            return True
        return name in _WITHOUT_MASK and self._every_write(mask)

    def cr3_write(self, value: int) -> bool:
        """MOV to CR3: is the new root watched? A repeated load of the present root counts as any other."""
        return self._cr3_writes and value & _CR3_BASE not in self._cr3_targets

    def table_write(self, name: registers_pb2.RegisterName.ValueType) -> bool:
        """LGDT, LIDT, LLDT, LTR."""
        return self._tables[name]

    def msr_write(self, index: int, old: int, new: int) -> bool:
        """Does a watched bit of the MSR change?"""
        mask = self._msr_writes.get(index, 0)
        return bool((old ^ new) & mask) or self._every_write(mask)

    def _every_write(self, mask: int) -> bool:
        return self._unchanged and mask == _ALL

    def msr_watched(self, index: int) -> bool:
        return index in self._msr_writes

    def msr_read(self, index: int) -> bool:
        return any(index in item for item in self._msr_reads)

    def port(self, port: int, size: int) -> bool:
        """Does any byte of the access lie in a watched range?"""
        return any(port + offset in item for item in self._ports for offset in range(size))
