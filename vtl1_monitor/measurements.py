"""What VTL1 hashed in sealed memory when VTL0 deprivileged itself, beside what the boot image has there."""

from __future__ import annotations

import hashlib

from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.policy.image import BootImage
from vtl1_monitor.policy.rules import MemoryRule
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import monitor_pb2


def measure(rule: MemoryRule, memory: GuestMemory, image: BootImage) -> monitor_pb2.Measurement:
    """Hashes the whole sealed pages of a rule, the rest of the last page included, and compares them with the image.

    Raises GuestFault if a page is not sealed.
    """
    gpa, size = rule.run.first * PAGE_SIZE, rule.run.pages * PAGE_SIZE
    sealed = memory.sealed(gpa, size)
    return monitor_pb2.Measurement(
        name=rule.name,
        gpa=gpa,
        size=size,
        sha256=hashlib.sha256(sealed).digest(),
        matches_image=sealed == image.expected(gpa, size),
    )
