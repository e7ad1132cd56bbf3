"""Where a processor stands with system-management mode."""

from __future__ import annotations

from vtlab.v1 import registers_pb2

RESET_BASE = 0x30000


class SystemManagement:
    """Of one processor.

    Attributes:
        base: SMBASE.
        active: between SMI and RSM.
        nmi_blocked: whether NMIs were before the SMI.
        before: what the processor held at the SMI; no guest can reach it.
        base_before: SMBASE then.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """RESET; INIT leaves all of it as it is."""
        self.base = self.base_before = RESET_BASE
        self.active = self.nmi_blocked = False
        self.before = registers_pb2.ProcessorState()
