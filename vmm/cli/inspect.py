"""`vtlab events`, `regs`, `mem`: a look at, and a hand on, a machine of a running laboratory."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmm.cli import laboratory, options
from vmm.cli.output import as_dict, print_json, print_table
from vtlab.errors import BadArgument

if TYPE_CHECKING:
    from vtlab.v1 import registers_pb2, vmm_pb2


def _number(text: str, subject: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise BadArgument(subject, f"{text!r} is not a number; write 4096 or 0x1000") from None


# ------------------------------------------------------------------------------------------------------------- events


def events(
    vm: options.Vm = "",
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="state, exit, verdict, serial, protection, lost, vtl, device.")
    ] = None,
    start: Annotated[int, typer.Option("--from", min=0, help="First number wanted; 0 is the oldest kept.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many; 0 never ends.")] = 0,
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Print what happens in a machine, as it happens."""
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        stream = machine.events(kind or [], start)
        for event in itertools.islice(stream, count or None):
            if as_json:
                print_json(as_dict(event))
            else:
                sys.stdout.write(describe(event) + "\n")
                sys.stdout.flush()


def describe(event: vmm_pb2.Event) -> str:
    """One line for people: number, time, vCPU and level, kind, and the event's own fields."""
    from vtlab.client.describe import detail
    from vtlab.client.names import event_name

    time = event.time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
    where = f"vp{event.vp_index}/VTL{event.vtl}"
    return f"{event.sequence:>6} {time} {where:<8} {event_name(event.kind):<10} {detail(event)}"


# --------------------------------------------------------------------------------------------------------------- regs


def regs(
    vm: options.Vm = "",
    vp_index: options.VpIndex = 0,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Write a register or msr:INDEX first.")
    ] = None,
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Print the registers of VTL0's vCPU; with --set, write some before."""
    registers, msrs = _assignments(assign or [])
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        if registers or msrs:
            state = machine.set_registers(registers, msrs, vp_index)
        else:
            state = machine.registers(vp_index)
    values = registers_as_dict(state)
    if as_json:
        print_json(values)
    else:
        print_table("", ["register", "value"], [[name, str(value)] for name, value in _flat(values)])


def _assignments(texts: list[str]) -> tuple[dict[str, int], dict[int, int]]:
    registers, msrs = {}, {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadArgument(f"--set {text}", "expected NAME=VALUE")
        number = _number(value, f"--set {text}")
        if name.lower().startswith("msr:"):
            msrs[_number(name[4:], f"--set {text}")] = number
        else:
            registers[name] = number
    return registers, msrs


def registers_as_dict(state: registers_pb2.ProcessorState) -> dict[str, Any]:
    """Registers by the manuals' names, in hexadecimal: JSON has no 64-bit numbers."""
    from google.protobuf.message import Message

    def shown(content: Any) -> Any:
        if isinstance(content, Message):
            return {field.name: shown(getattr(content, field.name)) for field in content.DESCRIPTOR.fields}
        return content if isinstance(content, bool) else f"{content:#x}"

    values: dict[str, Any] = shown(state.registers)
    for name in ("es", "fs", "gs", "ldtr", "tr", "gdtr", "idtr", "xcr0"):
        values[name] = shown(getattr(state, name))
    values["dr"] = [f"{one:#x}" for one in state.debug]
    values["msrs"] = {f"{msr.index:#x}": f"{msr.value:#x}" for msr in state.msrs}
    return values


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if name == "msrs":
            rows += [(f"msr {index}", content) for index, content in value.items()]
        elif isinstance(value, dict):
            rows.append((name, " ".join(f"{part}={content}" for part, content in value.items())))
        else:
            rows.append((name, " ".join(value) if isinstance(value, list) else str(value)))
    return rows


# ---------------------------------------------------------------------------------------------------------------- mem


def mem(
    address: Annotated[str, typer.Argument(help="Guest-physical, or guest-virtual with --virtual.")],
    size: Annotated[str, typer.Argument(help="Bytes to read.")] = "64",
    virtual: Annotated[bool, typer.Option("--virtual", help="Translate by VTL0's page tables.")] = False,
    write: Annotated[str, typer.Option("--write", metavar="HEX", help="Write these bytes first.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Bytes as they are, on stdout.")] = False,
    vm: options.Vm = "",
    vp_index: options.VpIndex = 0,
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Print memory of a machine, with VTL0's rights; with --write, write before."""
    start, length = _number(address, "address"), _number(size, "size")
    try:
        new = bytes.fromhex(write)
    except ValueError:
        raise BadArgument("--write", f"{write!r} is not a row of bytes in hexadecimal") from None
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        if virtual:
            walk = machine.translate(start, vp_index)
            if not walk.present:
                raise BadArgument(f"address {start:#x}", "is not mapped")
            if new:
                machine.write_memory(walk.gpa, new)
            data = machine.read_virtual(start, length, vp_index)
        else:
            if new:
                machine.write_memory(start, new)
            data = machine.read_memory(start, length)
    if as_json:
        print_json({"address": f"{start:#x}", "size": len(data), "hex": data.hex()})
    elif raw:
        sys.stdout.buffer.write(data)
    else:
        for line in hex_lines(start, data):
            sys.stdout.write(line + "\n")


def hex_lines(start: int, data: bytes) -> list[str]:
    """The bytes as `hexdump -C` prints them."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        pairs = row[:8].hex(" ").ljust(23) + "  " + row[8:].hex(" ").ljust(23)
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        lines.append(f"{start + at:016x}  {pairs}  |{text}|")
    return lines
