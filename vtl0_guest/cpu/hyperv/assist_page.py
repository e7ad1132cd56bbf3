"""The VP assist page: what a switch between levels leaves for the level that is entered (TLFS, HV_VP_ASSIST_PAGE)."""

from __future__ import annotations

import struct

from vtl0_guest.cpu.hyperv.pages import MsrPage
from vtlab.hyperv.layouts import ASSIST_ENTRY_REASON_OFFSET, ASSIST_RETURN_RAX_OFFSET, ASSIST_VINA_OFFSET

_PAIR = struct.Struct("<QQ")


class AssistPage(MsrPage):
    """VP_ASSIST_PAGE of one level. What is written while it is off is lost."""

    def set_entry_reason(self, reason: int) -> None:
        """1: VTL call, 2: interrupt."""
        self.write(ASSIST_ENTRY_REASON_OFFSET, struct.pack("<I", reason))

    def set_vina(self, asserted: bool) -> None:
        """Virtual interrupt notification assist: an interrupt for a lower level waits."""
        self.write(ASSIST_VINA_OFFSET, bytes([asserted]))

    @property
    def vina(self) -> bool:
        byte = self.read(ASSIST_VINA_OFFSET, 1)
        return byte is not None and bool(byte[0] & 1)

    def return_registers(self) -> tuple[int, int]:
        """RAX and RCX for the lower level after a VTL return that is not fast; zeros while the page is off."""
        raw = self.read(ASSIST_RETURN_RAX_OFFSET, _PAIR.size)
        if raw is None:
            return 0, 0
        rax, rcx = _PAIR.unpack(raw)
        return rax, rcx
