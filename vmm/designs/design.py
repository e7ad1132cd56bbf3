"""What a design gives to the machine that offers it. One object a machine: it outlives resets, the board does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from vmm.board import Answer, Board
from vmm.discovery import Leaf
from vmm.processor import Processor
from vmm.vtl import VTL0
from vtlab.errors import Unsupported
from vtlab.v1.vcpu_pb2 import Exit, InterceptFilter
from vtlab.v1.vmm_pb2 import MachineSpec, UserspaceFilters


class Design(ABC):
    """What all have, and what most do not need.

    Attributes:
        options: switches that MachineSpec.design_options may name.
        device_rights: with whose rights the VMM's own devices write guest memory: VTL0's, or the host's (1).
        has_state: what it answers may change it: its state is journaled with every exit that it serves.
    """

    options: ClassVar[tuple[str, ...]] = ()
    device_rights: ClassVar[int] = VTL0
    has_state: ClassVar[bool] = False

    def __init__(self, spec: MachineSpec) -> None:
        """Raises BadArgument for an option whose value is not legal."""
        self.spec = spec

    def filter(self) -> InterceptFilter:
        """What every vCPU of a new board watches; empty: nothing."""
        return InterceptFilter()

    def reset(self) -> None:  # noqa: B027 - most designs have nothing to forget
        """The machine is being reset: forgets what the design does not keep. Its board is built anew afterwards."""

    def save(self) -> bytes:
        """What a restarted VMM must know of it; the same state gives the same bytes."""
        return b""

    def restore(self, state: bytes) -> None:
        """The inverse of save(). Raises ValueError."""
        if state:
            raise ValueError("a design without state has none to restore")

    def watches(self, board: Board, processor: Processor) -> bool:
        """Whether what the filter of that vCPU watches is the design's to answer at present."""
        return True

    @abstractmethod
    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        """The answer to an exit of VTL0 that is watched."""

    @abstractmethod
    def hypercall(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        """VMCALL or VMMCALL."""

    @abstractmethod
    def leaf(self, board: Board, number: int) -> Leaf:
        """CPUID from 0x40000000 to 0x400000FF."""

    def set_filters(self, board: Board, filters: UserspaceFilters) -> None:
        """The owner of the machine replaces its filters.

        Raises:
            Unsupported: the design has none.
            BadArgument: they make no sense.
        """
        raise Unsupported("filters", f"a machine of design '{self.spec.design or 'vtl'}' has none")

    def unmapped(self, board: Board, processor: Processor, exit_: Exit) -> Answer | None:
        """A load or store where no RAM is; None if no device of the design is there."""
        return None
