"""One machine: its state, its threads, and the moves between states (vmm.states has the table).

The state has one owner, this class, under one lock. A vCPU that ends reports here from its own thread; what follows
(stopping the others, resetting) is done by another one, so that no thread waits for itself.
"""

from __future__ import annotations

import hashlib
import logging
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vmm import client_access, designs
from vmm.board import Board, Ending, reset_wanted, stopped
from vmm.devices import optional
from vmm.devices.bus import PortBus
from vmm.devices.disk import Disk, DiskController
from vmm.devices.fw_cfg import FwCfg
from vmm.devices.testdev import TestDevice
from vmm.events import EventLog
from vmm.exits import REASONS
from vmm.gate import Gate
from vmm.guarding import finish
from vmm.hyperv_msrs import SyntheticMsrs
from vmm.images import ImageStore
from vmm.ledger import Ledger
from vmm.level import Level, LevelLost
from vmm.memory import Memory
from vmm.past import Past
from vmm.processor import Processor
from vmm.run_loop import run
from vmm.states import CREATED, FAILED, PAUSED, RUNNING, STOPPED, Operation, after, state_name
from vmm.tracing import SwitchTracer
from vmm.vtl import VTL0, VTL1, PartitionVtl, VpVtl
from vtlab.errors import BadImage, InternalError, NotFound, TimedOut, VtlabError
from vtlab.hyperv.profiles import DEFAULT_PROFILE, PROFILES
from vtlab.ram import TURN_FILE, RamFile, create_turn_file, link_to_stores, remove_machine
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.journal_pb2 import MachineRecord
from vtlab.v1.registers_pb2 import ProcessorState
from vtlab.v1.vcpu_pb2 import (
    AttachRequest,
    BootImage,
    BootModule,
    InvalidateCode,
    MachineCheck,
    ReferenceClock,
    StandDown,
    Update,
)
from vtlab.v1.vmm_pb2 import DeviceEvent, HijackRequest, MachineSpec, MachineState

_log = logging.getLogger(__name__)

# Seconds for a level to let go when the machine stops, before its streams are cut.
_STOP_PATIENCE = 5.0
# Seconds that a vCPU may take to come out, or VTL1 to answer, when the VMM ends.
_DRAIN_PATIENCE = 3.0
# What a reset, a failure or the end of a vCPU is, by the state that the vCPU's thread asks for.
_FROM_INSIDE = {RUNNING: Operation.GUEST_RESETS, STOPPED: Operation.GUEST_ENDS, FAILED: Operation.BREAK}


class Machine:
    """Thread-safe.

    Attributes:
        vm: its name.
        spec: as it was created.
        events: what happened to it.
        exits: that this VMM has served, by reason.
    """

    def __init__(
        self,
        vm: str,
        spec: MachineSpec,
        directory: Path,
        images: ImageStore,
        guest: Level,
        monitor: Level | None,
        events: EventLog,
        ledger: Ledger | None = None,
        state: Path | None = None,
        tracer: SwitchTracer | None = None,
    ) -> None:
        """Creates it in `directory`, which must not exist, and has both levels attach; nothing is left if that fails.

        Args:
            monitor: None where the machine has no VTL1.
            ledger: where it is written down; None for nowhere.
            state: folder with the stores of memory files (vtlab.ram.Store); None keeps them in `directory`.
            tracer: of its VTL switches; None for none.

        Raises:
            NotFound: an image was not uploaded.
            BadImage: VTL0 cannot load it.
            PeerUnavailable: a level is not there.
        """
        self._set_up(vm, spec, directory, guest, monitor, events, ledger or Ledger(), tracer)
        directory.mkdir(parents=True)
        try:
            # VTL1 is the folder's group and VTL0 among the others where they have uids of their own (vtlab.ram.MODES).
            directory.chmod(stat.S_IMODE(directory.stat().st_mode) & stat.S_ISGID | 0o751)
            self._image = self._place_images(images)
            if state is not None:
                turn = [TURN_FILE] if self._guest_code else []
                link_to_stores(directory, state, [file.value for file in RamFile] + turn)
            self._memory = Memory(directory, spec.ram_size, self._code_written)
            self._disk = self._open_disk()
            if self._guest_code:
                create_turn_file(directory)
            self._board = self._new_board()
            self._attach(self._image)
            self._enter_state(CREATED)
        except BaseException:
            self._forget()
            raise
        self._spawn()

    @classmethod
    def revived(
        cls,
        past: Past,
        directory: Path,
        guest: Level,
        monitor: Level | None,
        events: EventLog,
        ledger: Ledger,
        tracer: SwitchTracer | None = None,
    ) -> Machine:
        """The machine of a VMM that died: it goes on where it was, or is reset if a level has lost it.

        Raises:
            InternalError: the journal's records make no machine.
            OSError, ValueError, BadArgument: its memory is gone or another's.
        """
        self = cls.__new__(cls)
        known = past.machine.machine
        self._set_up(known.vm, known.spec, directory, guest, monitor, events, ledger, tracer)
        self._state, self._reason, self._generation = known.state, known.reason, known.generation
        self._debug_exit = known.debug_exit if known.HasField("debug_exit") else None
        self._image = past.machine.image
        self._memory = Memory.reopened(directory, known.spec.ram_size, self._code_written, past.pages)
        self._disk = self._open_disk()
        self._board = self._new_board()
        past.restore(self._board)
        self._revive(renewing=past.machine.renewing)
        return self

    def _set_up(
        self,
        vm: str,
        spec: MachineSpec,
        directory: Path,
        guest: Level,
        monitor: Level | None,
        events: EventLog,
        ledger: Ledger,
        tracer: SwitchTracer | None,
    ) -> None:
        self._tracer = tracer
        self.exits = dict.fromkeys(REASONS, 0)
        self.vm = vm
        self.spec = spec
        self.events = events
        self._ledger = ledger
        self._design = designs.create(spec)
        self._guest = guest
        self._monitor = monitor
        self._directory = directory
        self._state: MachineState.ValueType = CREATED
        self._reason = ""
        self._destroyed = False
        self._debug_exit: int | None = None
        self._generation = 1
        self._control = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._disk = None

    def _revive(self, *, renewing: bool) -> None:
        with self._control:
            if self._state in (STOPPED, FAILED) and not renewing:
                return
            board = self._board
            try:
                if renewing:
                    self._renew()
                    self._enter_state(RUNNING, self._reason)
                    self._go()
                    return
                self._reconnect(board)
                with board.serving:
                    self._spawn()
                    finish(board)
                    board.commit()
            except LevelLost as error:
                if self._state != CREATED:
                    self._conclude(board, reset_wanted(self.spec, str(error)))
                    return
                self._break(str(error))
            except VtlabError as error:
                self._break(f"cannot go on after the VMM's end: {error}")
            else:
                if self._state == RUNNING:
                    board.gate.release()

    def _reconnect(self, board: Board) -> None:
        """Learns from the levels where each vCPU stands. Raises LevelLost, PeerUnavailable, InternalError."""
        stands = {level.vtl: level.reconnect(self._attach_request(level, self._image)) for level in self.levels()}
        seen, kept = (
            max(enter.transactions for enters in stands.values() for enter in enters),
            self._ledger.transactions,
        )
        if seen > kept:  # what it says of pages and levels is over, and to act on it would open what is protected
            raise InternalError("the journal", f"is an old one: it ends with transaction {kept}, and {seen} was made")
        for processor in board.processors:
            upper = stands[VTL1][processor.index] if VTL1 in stands else None
            processor.reconnect(stands[VTL0][processor.index], upper)
            settled = processor.run_settled()
            if settled is not None:
                board.record_serial(processor, VTL0, settled)
        self._listen()

    # -------------------------------------------------------------------------------------------------- for everyone

    def describe(self) -> vmm_pb2.Machine:
        """A copy of its state; never waits for the machine."""
        board = self._board
        return vmm_pb2.Machine(
            vm=self.vm,
            state=self._state,
            spec=self.spec,
            generation=self._generation,
            vtl1_enabled=board.processors[0].vtl.has(VTL1),
            debug_exit=self._debug_exit,
            reason=self._reason,
        )

    @property
    def enters(self) -> list[tuple[int, int]]:
        """For each vCPU, how often VTL0 and VTL1 were entered since the last RESET."""
        return [processor.enters for processor in self._board.processors]

    @property
    def pages(self) -> tuple[int, int, int]:
        """Pages in ram.rw, ram.ro and private."""
        return self._memory.counts

    def levels(self) -> list[Level]:
        """Who serves it; VTL1 first: it must be there, with the image, before VTL0 can run."""
        return [level for level in (self._monitor, self._guest) if level is not None]

    @contextmanager
    def doing(self, operation: Operation, *, parked: bool = False) -> Iterator[Board]:
        """The board, for an operation that leaves the state as it is.

        Args:
            parked: no vCPU runs and no exit is open within the block.

        Raises:
            WrongState: not legal now.
            TimedOut: a vCPU does not come out.
        """
        with self._control:
            self._after(operation)
            board = self._board
            with board.gate.all_parked() if parked else nullcontext():
                yield board
                if board.ledger.dirty:
                    with board.serving:
                        board.commit()

    # ------------------------------------------------------------------------------------------------------ the moves

    def start(self) -> vmm_pb2.Machine:
        return self._move(Operation.START, then=self._board.gate.release)

    def pause(self) -> vmm_pb2.Machine:
        return self._move(Operation.PAUSE, self._board.gate.park)

    def resume(self) -> vmm_pb2.Machine:
        return self._move(Operation.RESUME, then=self._board.gate.release)

    def stop(self) -> vmm_pb2.Machine:
        return self._move(Operation.STOP, self._stop_threads, reason="stopped by the operator")

    def reset(self) -> vmm_pb2.Machine:
        return self._move(Operation.RESET, self._renew, self._go)

    def hijack(self, request: HijackRequest) -> ProcessorState:
        """Stops the vCPUs, places code with VTL0's rights and registers as clients may, and goes on if asked.

        Returns:
            The state before it.
        """
        with self._control:
            self._after(Operation.HIJACK)
            board = self._board
            if self._state == RUNNING:
                board.gate.park()
            try:
                before = client_access.get_registers(board, request.vp_index)
                if request.code:
                    client_access.write_memory(board, request.code_gpa, request.code)
                client_access.set_registers(board, request.vp_index, request.registers)
            except BaseException:
                if self._state == RUNNING:
                    board.gate.release()
                raise
            self._enter_state(RUNNING if request.resume else PAUSED)
            if request.resume:
                board.gate.release()
            return before

    def check(self, vp_index: int, error: MachineCheck) -> vmm_pb2.Machine:
        """A machine check: VTL1 decides whether VTL0 hears of it, or what becomes of the machine."""
        with self._control:
            with self.doing(Operation.INJECT, parked=True) as board:
                verdict = client_access.inject_machine_check(board, vp_index, error)
            reason = f"by VTL1: {verdict.reason}"
            if verdict.action == vcpu_pb2.ACTION_RESET:
                self._conclude(board, reset_wanted(self.spec, f"reset {reason}"))
            elif verdict.action != vcpu_pb2.ACTION_COMMIT:
                self._conclude(board, stopped(f"halted {reason}"))
            return self.describe()

    def destroy(self) -> None:
        """Ends it and removes its memory. The levels forget it as far as they can be reached."""
        with self._control:
            self._after(Operation.DESTROY)
            self._destroyed = True
            self._stop_threads()
            self._ledger.forget()
            self._forget()

    def drain(self) -> None:
        """The VMM ends and another will go on: every vCPU stops between two exits, and all is written down.

        The levels keep the machine. Within _DRAIN_PATIENCE seconds; what is in progress then is done again by the next.
        """
        if not self._control.acquire(timeout=_DRAIN_PATIENCE):
            _log.warning("machine %s: a command is still in progress, and is given up", self.vm, extra={"vm": self.vm})
            return
        try:
            if self._destroyed:
                return
            board = self._board
            try:
                board.gate.park(_DRAIN_PATIENCE)
            except TimedOut as error:
                _log.warning("machine %s: %s; its exit is served again", self.vm, error, extra={"vm": self.vm})
            with board.serving:
                board.commit()
            for level in self.levels():
                level.close()
            self._stop_threads()
            self._memory.close()
            self.events.close()
            self._destroyed = True  # as far as this process goes
            _log.info("machine %s is written down at an exit", self.vm, extra={"vm": self.vm})
        finally:
            self._control.release()

    # -------------------------------------------------------------------------------------------------------- inside

    def _after(self, operation: Operation) -> MachineState.ValueType:
        """The state after an operation. Raises WrongState, or NotFound once destroyed."""
        if self._destroyed:
            raise NotFound(f"machine '{self.vm}'", "was destroyed")
        return after(self._state, operation, self.vm)

    def _move(
        self,
        operation: Operation,
        act: Callable[[], object] = lambda: None,
        then: Callable[[], object] = lambda: None,
        reason: str = "",
    ) -> vmm_pb2.Machine:
        """Does an operation and takes the state that follows; what is released by it comes `then`.

        If it fails half-way, the machine is FAILED.
        """
        with self._control:
            following = self._after(operation)
            try:
                act()
                self._enter_state(following, reason)
                then()
            except VtlabError as error:
                self._break(f"cannot {operation}: {error}")
                raise
            return self.describe()

    def _enter_state(self, state: MachineState.ValueType, reason: str = "", debug_exit: int | None = None) -> None:
        """Takes a state and writes it down. Raises InternalError if that fails."""
        self._state, self._reason, self._debug_exit = state, reason, debug_exit
        self.events.record(vmm_pb2.EVENT_KIND_STATE, self.describe())
        self._write_down()
        told = f"{state_name(state)}, generation {self._generation}" + (f": {reason}" if reason else "")
        _log.info("machine %s is %s", self.vm, told, extra={"vm": self.vm})

    def _write_down(self, *, renewing: bool = False) -> None:
        record = MachineRecord(machine=self.describe(), image=self._image, renewing=renewing)
        with self._board.serving:
            self._ledger.commit(self._board, machine=record)

    def _break(self, reason: str) -> None:
        _log.error("machine %s: %s", self.vm, reason, extra={"vm": self.vm})
        self._stop_threads()
        try:
            self._enter_state(FAILED, reason)
        except VtlabError as error:
            _log.error("machine %s: %s", self.vm, error, extra={"vm": self.vm})

    def _drive(self, board: Board, processor: Processor) -> None:
        """A vCPU's thread."""
        ending = run(board, processor)
        if ending.state:
            name = f"{self.vm}-ending"
            threading.Thread(target=self._conclude, args=(board, ending), name=name, daemon=True).start()

    def _conclude(self, board: Board, ending: Ending) -> None:
        """What a vCPU's end means for the machine; one that belongs to an earlier generation means nothing."""
        with self._control:
            operation = _FROM_INSIDE[ending.state]
            if board is not self._board or self._destroyed or self._state in (STOPPED, FAILED):
                return
            following = self._after(operation)
            if operation is Operation.BREAK:
                self._break(ending.reason)
                return
            try:
                if ending.stand_down is not None:
                    self._succeed(ending.stand_down)
                elif operation is Operation.GUEST_RESETS:
                    self._renew(keep=self.spec.keep_memory_on_reset and not board.vtl.zeroes_memory)
                else:
                    self._stop_threads()
                self._enter_state(following, ending.reason, ending.debug_exit)
                if operation is Operation.GUEST_RESETS:
                    self._spawn()
                    if following == RUNNING:
                        self._board.gate.release()
            except VtlabError as error:
                self._break(f"cannot {operation}: {error}")

    def _renew(self, *, keep: bool = False) -> None:
        """RESET: protections lifted, VTL1 destroyed, the image loaded again, running. By default memory is zeroed.

        Args:
            keep: what VTL0 could read stays in RAM.
        """
        self._stop_threads()
        self._write_down(renewing=True)
        self._detach(reset=True)
        self._design.reset()
        self._memory.reset(keep=keep)
        self._begin("reset", self._image)

    def _succeed(self, stand_down: StandDown) -> None:
        """kexec: both levels forget the kernel before; the one that VTL1 put into memory starts with the state it gave.

        Every register, device and translation of the processors is new, so nothing of VTL0's reaches the next kernel
        but memory that VTL0 could read.
        """
        self._stop_threads()
        self._write_down(renewing=True)  # whoever finds it half done resets the machine
        self._detach()
        self._memory.reset(keep=True)
        self._begin("kexec", self._place_successor(stand_down), stand_down.entry)

    def _begin(self, what: str, image: BootImage, start: ProcessorState | None = None) -> None:
        """The next generation, which _go() sets running. Nothing runs and both levels have let go."""
        self._generation += 1
        self._board = self._new_board()
        self._attach(image, start)
        self._board.log_vtl(self._board.processors[0], VTL0, what)

    def _go(self) -> None:
        self._spawn()
        self._board.gate.release()

    def _new_board(self) -> Board:
        spec = self.spec
        processors: list[Processor] = []
        gate = Gate(spec.vp_count, lambda vp_index, sequence: processors[vp_index].kick(sequence))
        gate.hold()  # until start
        fw_cfg = FwCfg(self._memory, spec.vp_count, self._log_device, vtl=self._design.device_rights)
        board = Board(
            vm=self.vm,
            spec=spec,
            memory=self._memory,
            events=self.events,
            gate=gate,
            guest=self._guest,
            monitor=self._monitor,
            vtl=PartitionVtl(offered=spec.vtl1 and self._monitor is not None),
            msrs=SyntheticMsrs(self._memory),
            ports=PortBus([fw_cfg, TestDevice()]),
            design=self._design,
            processors=processors,
            profile=PROFILES[spec.vsm_profile or DEFAULT_PROFILE.name],
            upper_msrs=SyntheticMsrs(self._memory, vtl=VTL1) if self._guest_code else None,
            disk=self._disk,
            ledger=self._ledger,
            tracer=self._tracer,
            exits=self.exits,
        )
        if self._disk is not None:
            board.ports.add(DiskController(self._disk, self._memory, self._log_device, self._design.device_rights))
        for device in optional.build(board):
            board.ports.add(device)
        processors += [
            Processor(index, self._guest, self._monitor, gate, VpVtl(), board.serving, board.commit, self._ledger)
            for index in range(spec.vp_count)
        ]
        wanted = self._design.filter()
        if wanted.ByteSize():
            board.watch_all(wanted)
        return board

    def _open_disk(self) -> Disk | None:
        return Disk(self._directory / "disk", self.spec.disk_size) if self.spec.disk_size else None

    @property
    def _guest_code(self) -> bool:
        """VTL1 is code that VTL0 supplies."""
        return self._monitor is not None and self.spec.personality == vcpu_pb2.PERSONALITY_GUEST_CODE

    def _spawn(self) -> None:
        board = self._board
        self._threads = [
            threading.Thread(
                target=self._drive, args=(board, processor), name=f"{self.vm}-vcpu{processor.index}", daemon=True
            )
            for processor in board.processors
        ]
        for thread in self._threads:
            thread.start()

    def _stop_threads(self) -> None:
        """Ends the vCPUs' threads; a level that does not let go has its streams cut."""
        threads, self._threads = self._threads, []
        if not threads:
            return
        try:
            self._board.gate.close(_STOP_PATIENCE)
        except TimedOut as error:
            _log.warning("machine %s: %s", self.vm, error, extra={"vm": self.vm})
            for level in self.levels():
                level.hang_up()
        for thread in threads:
            thread.join(_STOP_PATIENCE)

    # --------------------------------------------------------------------------------------------- images and levels

    def _place_images(self, images: ImageStore) -> BootImage:
        """Copies of the image and modules into the memory folder; returns the BootImage that names them."""
        boot = BootImage()
        boot.CopyFrom(self.spec.image)
        boot.path = "image"
        images.copy(boot.sha256, self._directory / boot.path)
        modules = []
        for number, module in enumerate(boot.modules):
            path = f"module-{number}"
            images.copy(module.sha256, self._directory / path)
            modules.append(BootModule(path=path, sha256=module.sha256, command_line=module.command_line))
        del boot.modules[:]
        boot.modules.extend(modules)
        return boot

    def _place_successor(self, stand_down: StandDown) -> BootImage:
        """The kernel's file out of memory. Raises BadImage if it is not the one that VTL1 means."""
        places = zip(stand_down.image[::2], stand_down.image[1::2], strict=True)
        data = b"".join(self._memory.read(gpa, size) for gpa, size in places)
        if hashlib.sha256(data).digest() != stand_down.image_sha256:
            raise BadImage("next kernel", "is not what VTL1 verified")
        path = self._directory / "successor"
        path.unlink(missing_ok=True)  # what a level has open stays as it was
        path.write_bytes(data)
        path.chmod(0o644)
        return BootImage(path=path.name, sha256=stand_down.image_sha256, format=vcpu_pb2.IMAGE_FORMAT_DETECT)

    def _attach(self, image: BootImage, start: ProcessorState | None = None) -> None:
        reference: ReferenceClock | None = None
        for level in self.levels():
            response = level.attach(self._attach_request(level, image, reference, start))
            if response is not None and response.HasField("reference"):
                reference = response.reference
        self._listen()

    def _listen(self) -> None:
        """Hears of interrupts, where both levels run guest code."""
        if self._guest_code and self._monitor is not None:
            gate = self._board.gate
            self._monitor.listen(lambda vp_index, _after: gate.interrupt(vp_index))

    def _attach_request(
        self,
        level: Level,
        image: BootImage,
        reference: ReferenceClock | None = None,
        start: ProcessorState | None = None,
    ) -> AttachRequest:
        return AttachRequest(
            vm=self.vm,
            generation=self._generation,
            vtl=level.vtl,
            vp_count=self.spec.vp_count,
            ram_size=self.spec.ram_size,
            memory_directory=str(self._directory),
            image=image,
            personality=self.spec.personality if self._guest_code else vcpu_pb2.PERSONALITY_UNSPECIFIED,
            reference=reference,
            local_apic_enabled=self._board.profile.local_apic_enabled,
            deterministic=self.spec.deterministic,
            seed=self.spec.seed,
            start=start,
        )

    def _detach(self, *, reset: bool = False) -> None:
        """VTL1 wipes its secrets first. A level that is gone or knows nothing of the machine has forgotten it."""
        for level in self.levels():
            try:
                level.detach(self.vm, reset=reset)
            except VtlabError as error:
                _log.warning("machine %s: VTL%d did not detach: %s", self.vm, level.vtl, error)

    def _forget(self) -> None:
        self._detach()
        for level in self.levels():
            level.close()
        memory = getattr(self, "_memory", None)
        if memory is not None:
            memory.close()
        if self._disk is not None:
            self._disk.close()
        remove_machine(self._directory)
        self.events.close()

    def _code_written(self, pages: list[int]) -> None:
        for vtl in (VTL0, VTL1) if self._guest_code else (VTL0,):
            self._board.post_all(Update(invalidate_code=InvalidateCode(gfns=pages)), vtl)

    def _log_device(self, event: DeviceEvent) -> None:
        self.events.record(vmm_pb2.EVENT_KIND_DEVICE, event)
