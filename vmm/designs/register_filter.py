"""KVM's MSR filter, and the same for control registers: what is filtered, as pure functions of the filter's data.

Source: Linux Documentation/virt/kvm/api.rst (KVM_X86_SET_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR), kvm_msr_allowed()
and kvm_add_msr_filter() in arch/x86/kvm/x86.c. For control registers there is no interface in KVM; Christopherson's
proposal (2024-05-03) is that it look like this one.
"""

from __future__ import annotations

from vtlab.errors import BadArgument
from vtlab.v1.vcpu_pb2 import IndexRange
from vtlab.v1.vmm_pb2 import RegisterFilter, UserspaceFilters
from vtlab.x86.registers import Msr

MAX_RANGES = 16
MAX_BITMAP = 0x600
INVALID, UNKNOWN, FILTERED = 1, 2, 4  # KVM_MSR_EXIT_REASON_*
X2APIC = range(0x800, 0x900)  # never filtered
CONTROL_REGISTERS = (0, 3, 4)
_WORD = 8  # bytes of BITS_TO_LONGS


def check(name: str, filter_: RegisterFilter) -> None:
    """Raises BadArgument, which names the range, where KVM_X86_SET_MSR_FILTER says EINVAL."""
    if len(filter_.ranges) > MAX_RANGES:
        raise BadArgument(name, f"EINVAL: {len(filter_.ranges)} ranges are more than {MAX_RANGES}")
    empty = True
    for number, one in enumerate(filter_.ranges):
        where = f"{name}.ranges[{number}]"
        if not one.count:
            continue
        empty = False
        if not (one.read or one.write):
            raise BadArgument(where, "EINVAL: is neither for reads nor for writes")
        size = -(-one.count // (8 * _WORD)) * _WORD
        if size > MAX_BITMAP:
            raise BadArgument(where, f"EINVAL: a bitmap of {size} bytes is more than {MAX_BITMAP}")
        if len(one.bitmap) != size:
            raise BadArgument(where, f"a bitmap for {one.count} registers has {size} bytes, not {len(one.bitmap)}")
    if empty and filter_.default_deny:
        raise BadArgument(name, "EINVAL: everything would be denied, with no range")


def check_all(filters: UserspaceFilters) -> None:
    """Raises BadArgument."""
    check("filters.msr", filters.msr)
    check("filters.cr", filters.cr)
    if filters.exit_reasons & ~(INVALID | UNKNOWN | FILTERED):
        raise BadArgument("filters.exit_reasons", f"EINVAL: {filters.exit_reasons:#x} has unknown bits")
    for number, one in enumerate(filters.cr.ranges):
        if one.read:
            raise BadArgument(f"filters.cr.ranges[{number}]", "reads of control registers do not exit")
    for rule in filters.rules:
        if not rule.msr and rule.index not in CONTROL_REGISTERS:
            raise BadArgument(f"rule '{rule.name}'", f"there is no filter for CR{rule.index}")


def allowed(filter_: RegisterFilter, index: int, write: bool) -> bool:
    """The first range that fits decides, else the default."""
    for one in filter_.ranges:
        if (one.write if write else one.read) and one.base <= index < one.base + one.count:
            bit = index - one.base
            return bool(one.bitmap[bit // 8] >> bit % 8 & 1)
    return not filter_.default_deny


def msr_allowed(filter_: RegisterFilter, index: int, write: bool) -> bool:
    return index in X2APIC or allowed(filter_, index, write)


def _named(filter_: RegisterFilter, write: bool) -> set[int]:
    """Registers that a range for that access names."""
    ranges = (one for one in filter_.ranges if (one.write if write else one.read))
    return {index for one in ranges for index in range(one.base, one.base + one.count)}


def denied_msr_writes(filter_: RegisterFilter) -> list[int]:
    """MSRs whose writes have to exit. With default deny, of those in no range, the architecture's by name."""
    candidates = _named(filter_, write=True)
    if filter_.default_deny:
        candidates |= {int(index) for index in Msr}
    return sorted(index for index in candidates if not msr_allowed(filter_, index, write=True))


def denied_msr_reads(filter_: RegisterFilter) -> list[IndexRange]:
    """Ranges whose reads have to exit; what is allowed among them is answered as if it had not."""
    if filter_.default_deny:
        return [IndexRange(first=0, count=(1 << 32) - 1)]
    denied = sorted(index for index in _named(filter_, write=False) if not msr_allowed(filter_, index, write=False))
    ranges: list[IndexRange] = []
    for index in denied:
        if ranges and ranges[-1].first + ranges[-1].count == index:
            ranges[-1].count += 1
        else:
            ranges.append(IndexRange(first=index, count=1))
    return ranges


def denied_crs(filter_: RegisterFilter) -> list[int]:
    return [number for number in CONTROL_REGISTERS if not allowed(filter_, number, write=True)]
