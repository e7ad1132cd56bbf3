"""The SIEF page: 2048 event flags for each SINT, set by others, cleared by the guest."""

from __future__ import annotations

from vtl0_guest.cpu.hyperv.pages import MsrPage
from vtlab.hyperv.synic import EVENT_FLAGS_COUNT

_AREA = EVENT_FLAGS_COUNT // 8


class EventFlagsPage(MsrPage):
    """SIEFP."""

    def signal(self, sint: int, flag: int) -> bool:
        """Sets a flag. True if it was clear: only then is there news, and an interrupt."""
        at = sint * _AREA + flag // 8
        byte = self.read(at, 1)
        bit = 1 << flag % 8
        if byte is None or byte[0] & bit:
            return False
        return self.write(at, bytes([byte[0] | bit]))
