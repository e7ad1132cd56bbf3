"""The ways for a guest to protect itself that a machine can offer, by name; docs/designs.md compares them.

A design is what a machine's VMM adds for it: which exits are watched from the start, how a watched exit is answered,
its hypercalls, its CPUID leaves, its registers in memory. All run on the same machine with the same guest.
"""

from __future__ import annotations

from vmm.designs.cr_filter import CrFilter
from vmm.designs.design import Design
from vmm.designs.heki import HekiV2, HekiV3
from vmm.designs.mmio import MmioDevice
from vmm.designs.native import Native
from vmm.designs.vtl import Vtl
from vtlab.errors import BadArgument
from vtlab.v1.vmm_pb2 import MachineSpec

__all__ = ["DEFAULT", "NAMES", "Design", "create"]

_TABLE: dict[str, type[Design]] = {
    "none": Native,
    "heki-v2": HekiV2,
    "heki-v3": HekiV3,
    "cr-filter": CrFilter,
    "mmio-device": MmioDevice,
    "vtl": Vtl,
}
NAMES = tuple(_TABLE)
DEFAULT = "vtl"


def create(spec: MachineSpec) -> Design:
    """The design of a machine, in its first state. Raises BadArgument that names an option or value at fault."""
    name = spec.design or DEFAULT
    design = _TABLE[name]
    if spec.HasField("filters") and design is not CrFilter:
        raise BadArgument("spec.filters", f"design '{name}' has no filters")
    for option in spec.design_options:
        if option not in design.options:
            known = ", ".join(design.options) or "none"
            raise BadArgument(f"option '{option}' of design '{name}'", f"does not exist; there are: {known}")
    return design(spec)
