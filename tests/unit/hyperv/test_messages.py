"""Intercept messages, byte for byte."""

from __future__ import annotations

import struct

import pytest

from vtlab.hyperv import messages
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, MemoryFault, MsrAccess, PortAccess, RegisterWrite

_CODE = registers_pb2.Segment(selector=0x08, attributes=0xA09B, limit=0xFFFFFFFF)
_DATA = registers_pb2.Segment(selector=0x10, attributes=0xC093, limit=0xFFFFFFFF)
_NAMES = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]


def leaving(**reason: object) -> Exit:
    registers = registers_pb2.Registers(
        rip=0x401000, rflags=0x246, cr0=0x80050033, efer=0x500, cs=_CODE, ds=_DATA, ss=_DATA, cr8=2
    )
    for number, name in enumerate(_NAMES):
        setattr(registers, name, 0x1000 + number)
    return Exit(
        vp_index=3,
        registers=registers,
        instruction=bytes.fromhex("488b00"),
        instruction_length=3,
        **reason,  # type: ignore[arg-type]
    )


CS = "0000000000000000ffffffff08009ba0"
DS = "0000000000000000ffffffff100093c0"


def flags(resume: bool) -> str:
    return struct.pack("<Q", 0x10246 if resume else 0x246).hex()


def head(access: int, length: int, *, resume: bool) -> str:
    return f"03000000{length | 0x20:02x}{access:02x}1c00{CS}0010400000000000{flags(resume)}"


def test_memory_message() -> None:
    exit_ = leaving(memory_fault=MemoryFault(gpa=0x1234568, gva=0x99, access=vcpu_pb2.ACCESS_KIND_READ))
    registers = "".join(struct.pack("<Q", 0x1000 + number).hex() for number in range(16))
    expected = (
        head(0, 3, resume=True)
        + "06000000"  # write-back
        + "03000000"  # bytes of the instruction; no virtual address; TPR; reserved
        + "0000000000000000"
        + "6845230100000000"
        + "488b00".ljust(32, "0")
        + DS
        + DS
        + registers
    )
    assert messages.memory_message(exit_).hex() == expected
    assert len(expected) == 2 * 240
    assert messages.memory_message(exit_, 80).hex() == expected[:160]


def test_an_execute_message_has_no_instruction() -> None:
    exit_ = leaving(memory_fault=MemoryFault(gpa=0x5000, access=vcpu_pb2.ACCESS_KIND_EXECUTE))
    message = messages.memory_message(exit_)
    assert message[:6].hex() == "030000002002"
    assert message[44] == 0
    assert message[64:80] == bytes(16)
    assert messages.memory_message(exit_, 240, branch_length=2)[4] == 0x22


def test_msr_message() -> None:
    exit_ = leaving(msr=MsrAccess(index=0xC0000082, write=True, new_value=5))
    expected = head(1, 3, resume=False) + "820000c000000000" + "0210000000000000" + "0010000000000000"
    assert messages.msr_message(exit_).hex() == expected
    assert messages.msr_write_message(exit_, 0xC0000080)[40:44].hex() == "800000c0"


@pytest.mark.parametrize(
    ("write", "info"),
    [
        (RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4, new_value=0x1122), "2211" + "00" * 14),
        (
            RegisterWrite(
                name=registers_pb2.REGISTER_NAME_GDTR, new_table=registers_pb2.TableRegister(base=0x7000, limit=0x3F)
            ),
            "0000000000003f000070000000000000",
        ),
    ],
)
def test_register_message(write: RegisterWrite, info: str) -> None:
    expected = head(1, 3, resume=False) + "00000000" + struct.pack("<I", write.name).hex() + info
    assert messages.register_message(leaving(register_write=write)).hex() == expected


def test_port_message() -> None:
    message = messages.port_message(leaving(port=PortAccess(port=0x3F8, write=False, size=4)))
    assert message[:40].hex() == head(0, 3, resume=False)
    assert message[40:48].hex() == "f803040300000000"
    assert message[48:56] == struct.pack("<Q", 0x1000)
    assert message[56:59].hex() == "488b00"
    assert message[104:128] == struct.pack("<3Q", 0x1001, 0x1006, 0x1007)


def test_execution_state() -> None:
    registers = registers_pb2.Registers(cpl=3, cr0=1, interrupt_shadow=True)
    assert messages.execution_state(registers) == 3 | 1 << 2 | 1 << 12
