"""What ends an instruction early: a fault that the guest takes, or a refusal by the nested table."""

from __future__ import annotations

from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Vector


class GuestFault(Exception):
    """An exception for the guest. `error_code` is None for the vectors that push none; `address` goes to CR2."""

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address


def general_protection(error_code: int = 0) -> GuestFault:
    return GuestFault(Vector.GP, error_code)


def undefined_opcode() -> GuestFault:
    return GuestFault(Vector.UD)


class NestedFault(Exception):
    """The nested table refused one of the core's own accesses on behalf of the guest.

    Attributes as in vcpu.proto, MemoryFault.
    """

    def __init__(
        self,
        gpa: int,
        access: vcpu_pb2.AccessKind.ValueType,
        *,
        gva: int | None = None,
        page_walk: bool = False,
        data: bytes = b"",
    ) -> None:
        super().__init__(gpa, access)
        self.gpa = gpa
        self.access = access
        self.gva = gva
        self.page_walk = page_walk
        self.data = data


class Shutdown(Exception):
    """Triple fault."""


class CannotEmulate(Exception):
    """The core does not know how to do this: the processor stops."""
