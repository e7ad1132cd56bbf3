"""The monitor: which machine it guards, and what operators may ask. Without gRPC; service.py forwards to it."""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vtl1_monitor import snapshot
from vtl1_monitor.api import CodeRule
from vtl1_monitor.keeper import Keeper, after_interruption
from vtl1_monitor.machine import Machine
from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.observer import observable
from vtl1_monitor.personality import PolicyProcessor
from vtl1_monitor.policy.image import BootImage, read_image
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.render import render
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.text import PolicyText, parse
from vtl1_monitor.quotes import Quoter
from vtl1_monitor.sealed import BrokenSeal, SealedStore
from vtl1_monitor.snapshot import Sealed
from vtl1_monitor.tickets import Tickets
from vtlab.attestation import NONCE_SIZES
from vtlab.errors import BadArgument, BadImage, Conflict, NotFound, Unsupported, VtlabError, WrongState
from vtlab.ram import TURN_FILE, Ram, RamFile
from vtlab.session import Execute, Session
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2
from vtlab.vcpu import Wakes

if TYPE_CHECKING:
    from vtl1_monitor.guest_code import GuestCode

_log = logging.getLogger(__name__)

VTL = 1
MAX_PROCESSORS = 64


class Monitor:
    """Guards one machine at a time, like any process that serves one level."""

    def __init__(
        self,
        rules: Iterable[CodeRule] = (),
        store: SealedStore | None = None,
        quoter: Quoter | None = None,
        around: Callable[[Execute], Execute] = lambda execute: execute,
    ) -> None:
        """Args:
        store: what a monitor that takes this one's place goes on with; None: nothing outlives it.
        quoter: signs what is asked for; None: nothing is signed.
        around: is put around what serves enters, to trace it.
        """
        self._rules = tuple(rules)
        self._store = store
        self._quoter = quoter
        self._around = around
        self._keeper = Keeper(store) if store is not None else None
        self._loss = ""
        self._lock = threading.Lock()
        self._machine: Machine | None = None
        self._sessions: list[Session] = []
        self._code: GuestCode | None = None
        self._silence = Wakes()
        # An operator's policy, and its lock, outlive a reset of the machine; destroying the machine ends them.
        self._overrides: dict[str, PolicyText] = {}
        self._tickets = Tickets()

    # ------------------------------------------------------------------------------------- for the VMM

    def attach(self, request: vcpu_pb2.AttachRequest) -> None:
        """Binds to a machine; a higher generation of the same one starts anew, the same again changes nothing.

        Raises:
            BadArgument, BadImage: the request or the image it names.
            Conflict: a lower generation. WrongState: another machine is attached.
        """
        with self._lock:
            current = self._machine
            if current is not None and current.vm != request.vm:
                raise WrongState(request.vm, f"the monitor guards {current.vm}", state="attached")
            if current is not None and request.generation == current.generation:
                return
            if current is not None and request.generation < current.generation:
                raise Conflict(request.vm, f"generation {request.generation} after {current.generation}")
            machine = self._create(request)
            code = None
            if request.personality == vcpu_pb2.PERSONALITY_GUEST_CODE:
                code = _guest_code(machine, request)
            self._close()
            machine.override = self._overrides.get(request.vm)
            self._machine = machine
            self._code = code
            self._loss = ""
            if code is None:
                self._serve(machine)
                if self._keeper is not None:
                    self._keeper.attached(request, machine)

    def _serve(self, machine: Machine) -> list[PolicyProcessor]:
        count = len(machine.processors)
        processors = [PolicyProcessor(machine, index, self._keep) for index in range(count)]
        self._sessions = [
            Session(f"vCPU {index} of VTL1", self._around(one.run)) for index, one in enumerate(processors)
        ]
        return processors

    def _keep(self, vp_index: int, enter: vcpu_pb2.Enter, exit_: vcpu_pb2.Exit) -> None:
        if self._keeper is not None and self._machine is not None:
            self._keeper.answered(self._machine, self._sessions, vp_index, enter, exit_)

    def restore(self) -> None:
        """Goes on where the monitor before this one died. What cannot be restored is told to whoever asks for it."""
        if self._keeper is None:
            return
        try:
            sealed = self._keeper.load()
            if sealed is not None:
                self._overrides = {vm: parse(text, name) for vm, (text, name) in sealed.overrides.items()}
                self._tickets = Tickets(sealed.tickets)
                if sealed.request:
                    self._restore_machine(sealed)
        except (BrokenSeal, VtlabError, PolicyProblems, OSError, ValueError) as error:
            _log.error("VTL1 cannot be restored: %s", error)
            self._loss = str(error)
            self._keeper.wipe()

    def _restore_machine(self, sealed: Sealed) -> None:
        machine = self._create(vcpu_pb2.AttachRequest.FromString(sealed.request))
        try:
            snapshot.load(machine, sealed.machine)
            processors = self._serve(machine)
            for session, kept in zip(self._sessions, sealed.sessions, strict=False):
                session.restore(*kept)
            for session in self._sessions[len(sealed.sessions) :]:
                session.restore(0, b"", b"")
            interrupted = sealed.interrupted
            if interrupted is not None:
                undo = after_interruption(machine, interrupted)
                processors[interrupted.vp_index].take_up(vcpu_pb2.Enter.FromString(interrupted.enter), undo)
        except BaseException:
            machine.memory.ram.close()
            self._sessions = []
            raise
        self._machine = machine

    def _create(self, request: vcpu_pb2.AttachRequest) -> Machine:
        if not request.vm:
            raise BadArgument("vm", "is empty")
        if request.vtl != VTL:
            raise BadArgument("vtl", f"this process is VTL1, not VTL{request.vtl}")
        if not 1 <= request.vp_count <= MAX_PROCESSORS:
            raise BadArgument("vp_count", f"{request.vp_count} is not between 1 and {MAX_PROCESSORS}")
        if not request.ram_size or request.ram_size % 4096:
            raise BadArgument("ram_size", f"{request.ram_size} is not a multiple of 4096")
        directory = Path(request.memory_directory)
        image = _load_image(directory, request.image)
        try:
            ram = Ram(directory, request.ram_size, "vtl1")
        except (OSError, ValueError) as error:
            raise BadArgument("memory_directory", str(error)) from None
        return Machine(
            request.vm, request.generation, request.vp_count, GuestMemory(ram), image, self._rules, self._tickets
        )

    def reference(self) -> vcpu_pb2.ReferenceClock | None:
        """The clock that VTL0 shares with guest code at VTL1; None where a policy answers."""
        code = self._code
        return code.reference() if code is not None else None

    def reconnect(self, vm: str, generation: int) -> list[vcpu_pb2.Enter]:
        """The last enter of each vCPU. Raises NotFound unless that generation of the machine is attached."""
        machine, code = self._machine, self._code
        if machine is None or (machine.vm, machine.generation) != (vm, generation):
            why = self._loss or "this process holds nothing of it"
            raise NotFound(f"generation {generation} of machine {vm}", why)
        return code.last_enters if code is not None else [session.last_enter for session in self._sessions]

    def detach(self, vm: str, *, reset: bool = False) -> None:
        """Wipes VTL1's memory and keys and forgets the machine, but for its operator's policy if it is reset.

        Raises NotFound.
        """
        with self._lock:
            self._require(vm)
            self._close()
            if not reset:
                self._overrides.pop(vm, None)
                self._tickets.forget(vm)
            if self._keeper is not None:
                self._keeper.detached(self._policies(), self._tickets.kept())

    def _policies(self) -> dict[str, tuple[str, str]]:
        return {vm: (policy.text, policy.file_name) for vm, policy in self._overrides.items()}

    def close(self) -> None:
        """Wipes whatever is attached."""
        with self._lock:
            self._silence.close()
            self._close()
            if self._keeper is not None:
                self._keeper.wipe()

    def _close(self) -> None:
        code, self._code = self._code, None
        if code is not None:
            code.close()
        if self._machine is not None:
            self._machine.close()
            ram = self._machine.memory.ram
            if code is not None:
                ram.views[RamFile.PRIVATE].madvise(mmap.MADV_REMOVE)  # which pages are VTL1's, its own code said
            ram.close()
        self._machine, self._sessions = None, []

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        """Serves one enter; the Exit is serialized. Raises NotFound if there is no such vCPU, WrongState, Conflict."""
        vp_index = enter.vp_index
        code = self._guest_code(vp_index) if self._code is not None else None
        return code.answer(enter) if code is not None else self._session(vp_index).answer(enter)

    def kick(self, vp_index: int, sequence: int) -> bool:
        """False if that enter has ended. One of the policy personality ends soon by itself: no service waits."""
        code = self._guest_code(vp_index)
        if code is not None:
            return code.kick(vp_index, sequence)
        return self._session(vp_index).running == sequence

    def state(self, vp_index: int) -> registers_pb2.ProcessorState:
        """Registers of VTL1's guest code. Raises Unsupported where the policy personality answers."""
        code = self._guest_code(vp_index)
        if code is not None:
            return code.state(vp_index)
        self._session(vp_index)
        raise Unsupported(f"vCPU {vp_index} of VTL1", "the policy personality runs no guest code and has no registers")

    def events(self, on_end: Callable[[Callable[[], None]], object]) -> Iterator[vcpu_pb2.EventsResponse]:
        """Interrupts for vCPUs of VTL1 that are not entered; the policy personality has none, its stream is silent.

        Args:
            on_end: see vtlab.vcpu.Wakes.stream.
        """
        code = self._code
        return code.events(on_end) if code is not None else self._silence.stream(on_end)

    def _guest_code(self, vp_index: int) -> GuestCode | None:
        """VTL1 where it is guest code. Raises NotFound for a vCPU that the machine does not have."""
        code, machine = self._code, self._machine
        if code is not None and machine is not None and vp_index >= len(machine.processors):
            raise NotFound(f"vCPU {vp_index}", f"the machine has {len(machine.processors)}")
        return code

    def _session(self, vp_index: int) -> Session:
        sessions = self._sessions
        if not sessions:
            raise WrongState("VTL1", "no machine is attached", state="detached")
        if vp_index >= len(sessions):
            raise NotFound(f"vCPU {vp_index}", f"the machine has {len(sessions)}")
        return sessions[vp_index]

    # ------------------------------------------------------------------------------------- for operators

    @property
    def machine(self) -> Machine | None:
        """The one that it guards."""
        return self._machine

    @property
    def seals(self) -> int:
        """See SealedStore.counter; 0 without a store."""
        return self._store.counter if self._store is not None else 0

    def policy(self, vm: str) -> monitor_pb2.PolicyStatus:
        """Raises NotFound."""
        machine = self._require(vm)
        with machine.turn:
            return machine.status()

    def set_policy(self, vm: str, text: str, file_name: str) -> monitor_pb2.PolicyStatus:
        """Replaces the guest's policy when the guest hands its own over. Raises BadPolicy, WrongState, NotFound."""
        machine = self._require(vm)
        parsed = parse(text, file_name or "policy")
        with machine.turn:
            if machine.locked or machine.taken:
                state = "locked" if machine.locked else "taken by the guest"
                raise WrongState(f"policy of {vm}", state=f"it is {state}", operation="replace it")
            if self._code is not None:
                observable(parsed, machine)  # nobody takes it later who could refuse
            machine.override = self._overrides[vm] = parsed
            self._keep_operators(machine)
            return machine.status()

    def lock_policy(self, vm: str) -> monitor_pb2.PolicyStatus:
        """Nothing replaces the policy until a reset. Raises NotFound."""
        machine = self._require(vm)
        with machine.turn:
            machine.operator_locked = True
            self._tickets.void(vm)  # what was sealed is not locked
            self._keep_operators(machine)
            return machine.status()

    def _keep_operators(self, machine: Machine) -> None:
        """What an operator did outlives this process, if it lives to say so. The machine's turn is held."""
        if self._keeper is not None:
            machine.wait_for_turn(None)
            self._keeper.changed(machine, self._policies())

    def check_policy(self, vm: str, text: str, file_name: str) -> monitor_pb2.CheckPolicyResponse:
        """Problems, or the rules that the text means. Without a machine only the text is checked."""
        try:
            parsed = parse(text, file_name or "policy")
            if not vm:
                return monitor_pb2.CheckPolicyResponse()
            machine = self._require(vm)
            rules = resolve(parsed, machine.image, machine.memory.size, None)
        except PolicyProblems as error:
            return monitor_pb2.CheckPolicyResponse(problems=error.problems)
        return monitor_pb2.CheckPolicyResponse(rules=render(rules))

    def quote(self, vm: str, nonce: bytes) -> monitor_pb2.SignedQuote:
        """What holds now, signed. Raises NotFound, BadArgument, Unsupported without a key."""
        machine = self._require(vm)
        if self._quoter is None:
            raise Unsupported("quote", "this monitor holds no key for quotes")
        if len(nonce) not in NONCE_SIZES:
            raise BadArgument("nonce", f"has {len(nonce)} bytes, not {NONCE_SIZES[0]} to {NONCE_SIZES[-1]}")
        with machine.turn:
            status = machine.status()
            quote = monitor_pb2.Quote(
                vm=vm,
                generation=machine.generation,
                nonce=nonce,
                policy_sha256=status.sha256,
                source=status.source,
                locked=status.locked,
                measurements=status.measurements,
                counter=self._store.counter if self._store is not None else 0,
                broken=machine.broken,
            )
        return self._quoter.signed(quote)

    def verdicts(self, vm: str, stop: threading.Event) -> Iterator[monitor_pb2.WatchVerdictsResponse]:
        """Verdicts kept and to come, until the machine is gone. Raises NotFound."""
        return self._require(vm).verdicts.watch(stop)

    def verdicts_so_far(self, vm: str) -> list[monitor_pb2.WatchVerdictsResponse]:
        """Verdicts kept. Raises NotFound."""
        return self._require(vm).verdicts.kept()

    def _require(self, vm: str) -> Machine:
        machine = self._machine
        if machine is None or machine.vm != vm:
            raise NotFound(vm or "machine", "the monitor does not guard it")
        return machine


def _guest_code(machine: Machine, request: vcpu_pb2.AttachRequest) -> GuestCode:
    from vtl1_monitor.guest_code import GuestCode  # loads the emulator, which no policy needs

    turn_file = Path(request.memory_directory) / TURN_FILE
    return GuestCode(machine, turn_file, local_apic_enabled=request.local_apic_enabled)


def _load_image(directory: Path, image: vcpu_pb2.BootImage) -> BootImage:
    """Reads the boot image and checks its digest. Raises BadArgument, BadImage."""
    path = PurePosixPath(image.path)
    if not image.path or path.is_absolute() or ".." in path.parts:
        raise BadArgument("image.path", f"'{image.path}' is not below the memory directory")
    try:
        data = (directory / path).read_bytes()
    except OSError as error:
        raise BadImage(image.path, error.strerror or "cannot be read") from None
    if not image.sha256:
        raise BadArgument("image.sha256", "is empty: nobody could say whether that is the image")
    if hashlib.sha256(data).digest() != image.sha256:
        raise BadImage(image.path, "SHA-256 is not the one asked for")
    flat = image.load_address if image.format == vcpu_pb2.IMAGE_FORMAT_FLAT else None
    return read_image(data, path.name, flat)
