"""The VP assist page: what a switch between levels leaves for the level that is entered (TLFS, HV_VP_ASSIST_PAGE)."""

from __future__ import annotations

import struct

from vtl0_guest.cpu.hyperv.pages import MsrPage
from vtlab.hyperv.layouts import ASSIST_ENTRY_REASON_OFFSET, ASSIST_RETURN_RAX_OFFSET, ASSIST_VINA_OFFSET

_PAIR = struct.Struct("<QQ")
_VINA_ASSERTED = 1


class AssistPage(MsrPage):
    """VP_ASSIST_PAGE of one level. What is written while it is off, or is no memory, is lost."""

    def note_entry(self, reason: int, rax: int, rcx: int) -> None:
        """Why this level is entered (1: VTL call, 2: interrupt), and RAX and RCX of the lower one."""
        if self.write(ASSIST_ENTRY_REASON_OFFSET, struct.pack("<I", reason)):
            self.write(ASSIST_RETURN_RAX_OFFSET, _PAIR.pack(rax, rcx))

    def return_registers(self) -> tuple[int, int]:
        """RAX and RCX for the lower level after a VTL return that is not fast; zeros where nothing can be read."""
        raw = self.read(ASSIST_RETURN_RAX_OFFSET, _PAIR.size)
        if raw is None:
            return 0, 0
        rax, rcx = _PAIR.unpack(raw)
        return rax, rcx

    def assert_vina(self) -> bool:
        """Sets VinaStatus; False where it is set already, or there is no page."""
        raw = self.read(ASSIST_VINA_OFFSET, 1)
        if raw is None or raw[0] & _VINA_ASSERTED:
            return False
        return self.write(ASSIST_VINA_OFFSET, bytes([raw[0] | _VINA_ASSERTED]))

    def reset_vina(self) -> None:
        """Clears it."""
        self.write(ASSIST_VINA_OFFSET, b"\0")
