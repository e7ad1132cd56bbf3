"""Which exits of VTL0 are VTL1's to judge: a pure question about an exit and the filter in force.

The core applies the filter; this decides only who answers an exit that can have two reasons (a port or MSR that no
device of the core claims exits by itself; VTL1 answers it if its filter names it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vtlab.hyperv.cpuid import HYPERVISOR_LEAVES
from vtlab.v1.vcpu_pb2 import Exit, IndexRange, InterceptFilter


def _in_ranges(index: int, ranges: Iterable[IndexRange]) -> bool:
    return any(item.first <= index < item.first + item.count for item in ranges)


class Watched:
    """An InterceptFilter, prepared for lookups."""

    def __init__(self, filter_: InterceptFilter) -> None:
        self.filter = filter_
        self.msr_writes = frozenset(item.index for item in filter_.msr_writes)

    def wants(self, kind: str, exit_: Exit) -> bool:
        """True if VTL1, enabled on that vCPU, is to judge the exit of that kind."""
        test = _TESTS.get(kind)
        return test is not None and test(self, exit_)


def _msr(watched: Watched, exit_: Exit) -> bool:
    if exit_.msr.write:
        return exit_.msr.index in watched.msr_writes
    return _in_ranges(exit_.msr.index, watched.filter.msr_reads)


# kind -> is it VTL1's. Kinds that are not here are the VMM's.
_TESTS: dict[str, Callable[[Watched, Exit], bool]] = {
    "register_write": lambda _watched, _exit: True,
    "state_load": lambda _watched, _exit: True,
    "sleep": lambda watched, _exit: watched.filter.sleeps,
    "msr": _msr,
    "memory_fault": lambda _watched, exit_: not exit_.memory_fault.unmapped,
    "startup": lambda _watched, _exit: True,
    "invlpg": lambda watched, _exit: watched.filter.invlpg,
    "port": lambda watched, exit_: _in_ranges(exit_.port.port, watched.filter.ports),
    "cpuid": lambda watched, exit_: watched.filter.cpuid and exit_.cpuid.leaf not in HYPERVISOR_LEAVES,
    "halt": lambda watched, _exit: watched.filter.hlt,
}
