"""Design `none`: a plain KVM machine. The kernel pins its registers by itself, or nobody does.

It is also what the designs without VTL1 build upon: KVM's hypercalls and leaves, and nothing watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vmm.board import Answer, Board, complete
from vmm.designs import kvm_abi
from vmm.designs.design import Design
from vmm.designs.kvm_abi import KvmCall, KvmErrno
from vmm.discovery import Leaf
from vmm.processor import Processor
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, InterceptFilter, Resolution

Hypercalls = dict[int, Callable[[Any, Board, Processor, KvmCall], int]]
DENY = Resolution(action=vcpu_pb2.ACTION_DENY)


class Native(Design):
    """Attributes: `hypercalls`: number -> what serves it, with the value of RAX; others are -KVM_ENOSYS."""

    hypercalls: ClassVar[Hypercalls] = {}

    def filter(self) -> InterceptFilter:
        return InterceptFilter(user_hypercalls=True)

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        """Nothing is watched: who asks is refused."""
        return processor.resume(DENY)

    def leaf(self, board: Board, number: int) -> Leaf:
        return kvm_abi.leaf(number)

    def hypercall(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        call = kvm_abi.decode(exit_.registers)
        if call.cpl:
            return processor.resume(complete(call.result(-KvmErrno.PERM)))
        serve = self.hypercalls.get(call.number)
        value = serve(self, board, processor, call) if serve is not None else -KvmErrno.NOSYS
        return processor.resume(complete(call.result(value)))
