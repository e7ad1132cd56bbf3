"""The page that a guest calls for hypercalls (TLFS, "Hypercall Page"), laid out as by openvmm; unused bytes are INT3.

VMMCALL stands where Intel processors have VMCALL: the modelled processor is AMD.
"""

from __future__ import annotations

HYPERCALL, VTL_CALL_32, VTL_CALL, VTL_RETURN_32, VTL_RETURN = 0x00, 0x04, 0x0F, 0x1B, 0x26
_CALL = bytes.fromhex("0f01d9c3")  # vmmcall; ret


def content() -> bytes:
    """4096 bytes."""
    page = bytearray(b"\xcc" * 4096)
    parts = {
        HYPERCALL: _CALL,
        VTL_CALL_32: bytes.fromhex("89c8b911000000") + _CALL,  # mov eax, ecx; mov ecx, 0x11
        VTL_CALL: bytes.fromhex("4889c8b911000000") + _CALL,  # mov rax, rcx; mov ecx, 0x11
        VTL_RETURN_32: bytes.fromhex("89c8b912000000") + _CALL,
        VTL_RETURN: bytes.fromhex("4889c8b912000000") + _CALL,
    }
    for offset, code in parts.items():
        page[offset : offset + len(code)] = code
    return bytes(page)
