"""`vtlab run`: boots an image as QEMU would, with the guest's serial port on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from vmm.cli import options
from vmm.cli.exit_codes import ExitCode, of_debug_exit
from vmm.cli.output import print_error, print_json
from vmm.cli.qemu_options import FlatStart, SerialTarget, parse_flat, parse_modules, parse_ram, parse_serial
from vtlab.errors import BadArgument, VtlabError

if TYPE_CHECKING:
    from vtlab.client import Machine
    from vtlab.v1 import vcpu_pb2, vmm_pb2


def run(
    image: Annotated[str, typer.Argument(help="Linux kernel, multiboot, ELF or flat image.")] = "",
    kernel: Annotated[str, typer.Option("-kernel", metavar="IMAGE", help="The same as the argument.")] = "",
    ram: Annotated[str, typer.Option("-m", metavar="SIZE", help="RAM, in MiB or with a unit.")] = "64M",
    processors: Annotated[int, typer.Option("-smp", metavar="N", min=1, help="vCPUs.")] = 1,
    append: Annotated[str, typer.Option("-append", metavar="TEXT", help="Kernel command line.")] = "",
    initrd: Annotated[
        str, typer.Option("-initrd", metavar="FILE[ ARGS][,…]", help="Initial RAM disk, or multiboot modules.")
    ] = "",
    serial: Annotated[
        list[str] | None,
        typer.Option("-serial", metavar="TARGET", help="stdio, file:PATH or null; twice for COM2."),
    ] = None,
    no_reboot: Annotated[bool, typer.Option("-no-reboot", help="Stop where the machine would reset.")] = False,
    flat: Annotated[
        str,
        typer.Option(
            "--flat", metavar="ADDRESS[,MODE]", help="The image is raw bytes for there; MODE real, protected, long."
        ),
    ] = "",
    device: Annotated[
        list[str] | None,
        typer.Option("-device", metavar="NAME", help="An optional device: hyperv-testdev."),
    ] = None,
    no_vtl1: Annotated[bool, typer.Option("--no-vtl1", help="Do not offer VTL1 to the guest.")] = False,
    guest_vtl1: Annotated[
        bool, typer.Option("--guest-vtl1", help="VTL1 is code that the guest supplies, not a policy.")
    ] = False,
    vsm_profile: Annotated[
        str, typer.Option("--vsm-profile", metavar="NAME", help="How VSM answers: openvmm (default), tlfs or kvm.")
    ] = "",
    policy: Annotated[str, typer.Option("--policy", metavar="FILE", help="Policy that overrides the guest's.")] = "",
    guard_on: Annotated[
        str, typer.Option("-guard-on", metavar="TEXT", help="Guard it with --policy when COM1 has said this.")
    ] = "",
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Stop it then.", min=0)] = 0,
    rules: options.Rules = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Boot an image and wait for its end; Ctrl-C stops it. Returns (value << 1) | 1 of the guest's debug exit."""
    if bool(image) == bool(kernel):
        raise BadArgument("image", "give one, as an argument or by -kernel")
    image = image or kernel
    size = parse_ram(ram)
    targets = parse_serial(serial or [])
    modules = parse_modules(initrd)
    start = parse_flat(flat)
    text = read_text(policy)
    if guard_on and not policy:
        raise BadArgument("-guard-on", "needs --policy: what shall hold")
    with contextlib.ExitStack() as stack:
        sinks = stack.enter_context(_sinks(targets, as_json))
        lab = stack.enter_context(options.given_or_private(vmm, monitor, trust, rules, as_json))
        machine = stack.enter_context(
            lab.create(
                image,
                ram=size,
                vp_count=processors,
                command_line=append,
                modules=list(modules),
                vtl1=not no_vtl1,
                devices=device or [],
                personality=_personality(guest_vtl1),
                vsm_profile=vsm_profile,
                stop_on_reset=no_reboot,
                **_boot(start),
            )
        )
        if policy:
            lab.policy.set(machine, text, policy)
        if targets[0].stdio or targets[1].stdio:
            _forward_stdin(machine, 0 if targets[0].stdio else 1)
        late = _start(machine, timeout, stack)
        end = _follow(machine, sinks, _Trigger(machine, guard_on))
        return _report(machine, end, late.is_set(), timeout, as_json)


def _personality(guest_code: bool) -> vcpu_pb2.Personality.ValueType:
    from vtlab.v1 import vcpu_pb2

    return vcpu_pb2.PERSONALITY_GUEST_CODE if guest_code else vcpu_pb2.PERSONALITY_UNSPECIFIED


def _boot(start: FlatStart | None) -> dict[str, Any]:
    """Arguments of Lab.create() for a flat image; none lets the file's own magic numbers decide."""
    if start is None:
        return {}
    from vtlab.v1 import vcpu_pb2

    return {
        "image_format": vcpu_pb2.IMAGE_FORMAT_FLAT,
        "load_address": start.address,
        "entry": start.address,
        "start_mode": vcpu_pb2.StartMode.Value(f"START_MODE_{start.mode.upper()}"),
    }


def read_text(file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadArgument(file, f"is not UTF-8 text: {error}") from None


@contextlib.contextmanager
def _sinks(targets: tuple[SerialTarget, SerialTarget], as_json: bool) -> Iterator[dict[int, IO[bytes]]]:
    """Port -> where its bytes go. Files are made before anything starts, so that a bad path costs nothing."""
    with contextlib.ExitStack() as stack:
        sinks: dict[int, IO[bytes]] = {}
        for port, target in enumerate(targets):
            if target.file is not None:
                sinks[port] = stack.enter_context(target.file.open("wb", buffering=0))
            elif target.stdio and not as_json:
                sinks[port] = sys.stdout.buffer
        yield sinks


def _forward_stdin(machine: Machine, port: int) -> None:
    """Types what comes on stdin, from a thread that ends with the process; a terminal is the guest's to echo."""
    if sys.stdin is None or sys.stdin.closed:
        return
    descriptor = sys.stdin.fileno()

    def forward() -> None:
        with contextlib.suppress(VtlabError, OSError):
            while data := os.read(descriptor, 4096):
                machine.write_serial(port, data)

    threading.Thread(target=forward, name="stdin", daemon=True).start()


@contextlib.contextmanager
def _quiet_terminal() -> Iterator[None]:
    """No echo and no line editing on a terminal; Ctrl-C stays ours."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _start(machine: Machine, timeout: float, stack: contextlib.ExitStack) -> threading.Event:
    """Starts the machine and, if asked, a clock that stops it; the event tells that the clock did."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        with contextlib.suppress(VtlabError):
            machine.stop()

    stack.enter_context(_quiet_terminal())
    if timeout:
        clock = threading.Timer(timeout, stop)
        clock.daemon = True
        stack.callback(clock.cancel)
        clock.start()
    machine.start()
    return late


class _Trigger:
    """Guards the machine once, when COM1 has said a text."""

    def __init__(self, machine: Machine, text: str) -> None:
        self._machine = machine
        self._text = text.encode()
        self._seen = b""

    def feed(self, port: int, data: bytes) -> None:
        if not self._text or port:
            return
        self._seen += data
        if self._text in self._seen:
            self._text = b""
            self._machine.guard()
        else:
            self._seen = self._seen[-len(self._text) :]


def _follow(machine: Machine, sinks: dict[int, IO[bytes]], trigger: _Trigger) -> vmm_pb2.Machine:
    """Copies serial output as it comes, until the machine has ended."""
    from vtlab.client.serial import ENDED

    for event in machine.events(["serial", "state", "lost"]):
        kind = event.WhichOneof("detail")
        if kind == "serial":
            if sink := sinks.get(event.serial.port):
                sink.write(event.serial.data)
                sink.flush()
            trigger.feed(event.serial.port, event.serial.data)
        elif kind == "lost":
            print_error(f"{event.lost.count} events were lost, maybe with serial output")
        elif kind == "state" and event.state.state in ENDED:
            return event.state
    return machine.info()


def _report(machine: Machine, end: vmm_pb2.Machine, late: bool, timeout: float, as_json: bool) -> int:
    from vtlab.client.names import state_name

    state = state_name(end.state)
    code: int = ExitCode.OK
    if end.HasField("debug_exit"):
        code = of_debug_exit(end.debug_exit)
    elif late:
        code = ExitCode.TIMED_OUT
        print_error(f"machine '{machine.name}': did not end in {timeout:g} s")
    elif state == "FAILED":
        code = ExitCode.GUEST_FAILED
        print_error(f"machine '{machine.name}': failed: {end.reason or 'no reason given'}")
    if as_json:
        machine.wait_state(end.state)  # all serial output has arrived then
        print_json(
            {
                "exit_code": int(code),
                "state": state,
                "reason": end.reason,
                "debug_exit": end.debug_exit if end.HasField("debug_exit") else None,
                "generation": end.generation,
                "serial": [machine.serial(0), machine.serial(1)],
            }
        )
    return code
