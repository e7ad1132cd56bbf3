"""One machine from its images to its end, serial ports on our stdio: what `vtlab run` and `vtlab-qemu` share."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vmm.cli.exit_codes import ExitCode, of_debug_exit
from vmm.cli.exit_log import ExitLog
from vmm.cli.output import print_error, print_json
from vmm.cli.qemu_options import FlatStart, SerialTarget
from vtlab.errors import VtlabError

if TYPE_CHECKING:
    from vtlab.client import Lab, Machine
    from vtlab.v1 import vcpu_pb2, vmm_pb2


@dataclass(frozen=True, kw_only=True)
class Boot:
    """What to boot and how, options understood.

    Attributes:
        image: file of the kernel.
        ram: bytes.
        modules: files and command lines for the boot loader's list.
        serial: where COM1 and COM2 go.
        no_reboot: end where the machine would reset.
        start: address and mode of a flat image; none lets the file's own magic numbers decide.
        vtl1: offer VTL1 to the guest.
        design, design_options: how the guest may protect itself (docs/designs.md).
        guest_vtl1: VTL1 is code that the guest supplies, not a policy.
        policy, policy_name: text of a policy that overrides the guest's, and the file that it came from.
        guard_on: guard the machine with the policy once COM1 has said this.
        timeout: seconds after which it is stopped; 0 is never.
        deterministic: seed of a run that repeats.
        exit_log: file for a line an exit.
        as_json: the report is one line of JSON with the serial output in it.
    """

    image: str
    ram: int
    processors: int = 1
    command_line: str = ""
    modules: tuple[tuple[str, str], ...] = ()
    serial: tuple[SerialTarget, SerialTarget]
    no_reboot: bool = False
    start: FlatStart | None = None
    devices: tuple[str, ...] = ()
    vtl1: bool = True
    guest_vtl1: bool = False
    vsm_profile: str = ""
    design: str = "vtl"
    design_options: dict[str, str] = field(default_factory=dict)
    policy: str = ""
    policy_name: str = ""
    guard_on: str = ""
    timeout: float = 0
    deterministic: int | None = None
    exit_log: str = ""
    as_json: bool = False


def boot(what: Boot, laboratory: contextlib.AbstractContextManager[Lab]) -> int:
    """Boots it and waits for its end. Returns the exit code: (value << 1) | 1 of the guest's debug exit, or ours."""
    with contextlib.ExitStack() as stack:
        sinks = stack.enter_context(_sinks(what.serial, what.as_json))
        log_file = stack.enter_context(Path(what.exit_log).open("w", encoding="ascii")) if what.exit_log else None
        lab = stack.enter_context(laboratory)
        machine = stack.enter_context(
            lab.create(
                what.image,
                ram=what.ram,
                vp_count=what.processors,
                command_line=what.command_line,
                modules=list(what.modules),
                vtl1=what.vtl1,
                devices=what.devices,
                personality=_personality(what.guest_vtl1),
                vsm_profile=what.vsm_profile,
                design=what.design,
                design_options=what.design_options,
                stop_on_reset=what.no_reboot,
                deterministic=what.deterministic,
                **_flat(what.start),
            )
        )
        if what.policy:
            lab.policy.set(machine, what.policy, what.policy_name)
        for port, target in enumerate(what.serial):
            if target.stdio:
                _forward_stdin(machine, port)
        log = ExitLog(machine, log_file) if log_file is not None else None
        late = _start(machine, what.timeout, stack)
        end = _follow(machine, sinks, _Trigger(machine, what.guard_on))
        if log is not None and (lost := log.finish()):
            print_error(f"{what.exit_log}: {lost} events are missing: they came faster than they could be written")
        return _report(machine, end, late.is_set(), what.timeout, what.as_json)


def _personality(guest_code: bool) -> vcpu_pb2.Personality.ValueType:
    from vtlab.v1 import vcpu_pb2

    return vcpu_pb2.PERSONALITY_GUEST_CODE if guest_code else vcpu_pb2.PERSONALITY_UNSPECIFIED


def _flat(start: FlatStart | None) -> dict[str, Any]:
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
