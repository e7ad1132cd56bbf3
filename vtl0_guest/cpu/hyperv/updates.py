"""Updates of an enter for synthetic interrupts: what they must hold, and what they do, by kind."""

from __future__ import annotations

from collections.abc import Callable

from vtl0_guest.cpu.hyperv.virtual_processor import VirtualProcessor
from vtlab.errors import BadArgument
from vtlab.hyperv.synic import EVENT_FLAGS_COUNT, FIRST_VECTOR, MAX_PAYLOAD, SINT_COUNT, MessageType
from vtlab.v1.vcpu_pb2 import Update


def _require(holds: bool, subject: str, detail: str) -> None:
    if not holds:
        raise BadArgument(subject, detail)


def _check_sint(kind: str, sint: int) -> None:
    _require(sint < SINT_COUNT, f"{kind}.sint", f"{sint} is not below {SINT_COUNT}")


def _check_message(update: Update) -> None:
    message = update.synic_message
    _check_sint("synic_message", message.sint)
    _require(message.type != MessageType.NONE, "synic_message.type", "is 0, which marks a free slot")
    size = len(message.payload)
    _require(size <= MAX_PAYLOAD, "synic_message.payload", f"is {size} bytes, more than {MAX_PAYLOAD}")


def _check_event(update: Update) -> None:
    _check_sint("synic_event", update.synic_event.sint)
    flag = update.synic_event.flag
    _require(flag < EVENT_FLAGS_COUNT, "synic_event.flag", f"{flag} is not below {EVENT_FLAGS_COUNT}")


def _check_interrupt(update: Update) -> None:
    _check_sint("synic_interrupt", update.synic_interrupt.sint)


def _check_vector(update: Update) -> None:
    vector = update.apic_interrupt.vector
    _require(FIRST_VECTOR <= vector <= 0xFF, "apic_interrupt.vector", f"{vector} is not between 16 and 255")


def _check_notice(update: Update) -> None:
    notice = update.interrupt_notice
    _require(
        notice.reset or FIRST_VECTOR <= notice.vector <= 0xFF,
        "interrupt_notice.vector",
        f"{notice.vector} is not between 16 and 255",
    )


def _post(vp: VirtualProcessor, update: Update) -> None:
    message = update.synic_message
    vp.synic.post(message.sint, message.type, message.origin, message.payload, drop_if_busy=message.drop_if_busy)


CHECKS: dict[str, Callable[[Update], None]] = {
    "synic_message": _check_message,
    "synic_event": _check_event,
    "synic_interrupt": _check_interrupt,
    "apic_interrupt": _check_vector,
    "interrupt_notice": _check_notice,
}
"""Each raises BadArgument, before anything is applied."""

APPLY: dict[str, Callable[[VirtualProcessor, Update], None]] = {
    "synic_message": _post,
    "synic_event": lambda vp, update: vp.synic.signal(update.synic_event.sint, update.synic_event.flag),
    "synic_interrupt": lambda vp, update: vp.synic.raise_sint(update.synic_interrupt.sint),
    "interrupt_notice": lambda vp, update: vp.notice(update.interrupt_notice),
    "apic_interrupt": lambda vp, update: vp.interrupt(update.apic_interrupt.vector),
}
