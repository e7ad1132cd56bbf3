"""What VTL1 knows of one machine. It has one owner at a time: the vCPU whose enter is being served (`turn`)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from cryptography import x509

from vtl1_monitor import api, rights
from vtl1_monitor.api import CodeRule
from vtl1_monitor.filter import intercept_filter
from vtl1_monitor.judge import Verdict, judge
from vtl1_monitor.kexec_image import KexecModule
from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.poison_judge import judge_poison
from vtl1_monitor.policy.image import BootImage
from vtl1_monitor.policy.render import render
from vtl1_monitor.policy.rules import Action, Rules
from vtl1_monitor.policy.schema import Phase, SleepMode
from vtl1_monitor.policy.text import PolicyText
from vtl1_monitor.protection_judge import judge_protection
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.secrets import Secrets
from vtl1_monitor.sleep_judge import judge_sleep
from vtl1_monitor.startup_judge import KEPT, judge_startup, kept
from vtl1_monitor.state_load import judge_load
from vtl1_monitor.table_guard import TableGuard
from vtl1_monitor.tickets import Tickets
from vtl1_monitor.verdicts import VerdictLog
from vtlab.errors import WrongState
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.services import ModuleType
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2

BOOT_RULE = "boot"
"""Owner of pages that keep the kernel's rights until a rule of the end of boot takes them."""


@dataclass
class Kdata:
    """What LOAD_KDATA and the policy's sections gave: from sealed, measured memory only.

    Attributes:
        patches: (gpa, size) -> the bytes that may be written there.
        revoked: (issuer as DER, serial number).
    """

    certificates: list[x509.Certificate] = field(default_factory=list)
    revoked: set[tuple[bytes, int]] = field(default_factory=set)
    patches: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)

    def signers(self) -> list[x509.Certificate]:
        """Certificates that may sign modules."""
        return [one for one in self.certificates if (one.issuer.public_bytes(), one.serial_number) not in self.revoked]


@dataclass(frozen=True)
class Successor:
    """A verified kernel image, sealed.

    Attributes:
        runs: its pages, those of its list, and those kept for what it will lie on.
        file: (gpa, size) of the signed file, in order.
        sha256: of the signed file.
        modules: what it will find.
        kept: (gpa, size) for what it will lie on; None without.
    """

    runs: tuple[Run, ...]
    file: tuple[tuple[int, int], ...]
    sha256: bytes
    modules: tuple[KexecModule, ...]
    kept: tuple[int, int] | None


@dataclass
class Processor:
    """One vCPU of VTL0.

    Attributes:
        locked: LOCK_REGS was called.
        filter_version: which filter it runs with.
        sealed: ProcessorState, serialized, that it held when it fell asleep, while its waking code runs.
        window: pages below 1 MiB that it may execute since SIPI, where no rule names them.
        keeps_pins: VTL1 has set its pins; what it writes meanwhile is written with them, until it sets them itself.
    """

    locked: bool = False
    filter_version: int = 0
    sealed: bytes | None = None
    window: set[int] = field(default_factory=set)
    keeps_pins: bool = False


class Machine:
    """State of VTL1 for one machine and generation."""

    def __init__(
        self,
        vm: str,
        generation: int,
        vp_count: int,
        memory: GuestMemory,
        image: BootImage,
        rules_in_code: Iterable[CodeRule] = (),
        tickets: Tickets | None = None,
    ) -> None:
        self.vm = vm
        self.generation = generation
        self.memory = memory
        self.image = image
        self.turn = threading.Condition()
        self.serving: object = None
        self.closed = False
        self.processors = [Processor() for _ in range(vp_count)]
        self.verdicts = VerdictLog()
        self.code_rules = api.copies(rules_in_code)
        self.secrets = Secrets()
        self.tickets = tickets or Tickets()
        # The image that HIBERNATE sealed, until VTL0 goes on instead.
        self.hibernation: Run | None = None

        self.override: PolicyText | None = None
        self.operator_locked = False
        self.policy: PolicyText | None = None
        self.source = monitor_pb2.POLICY_SOURCE_NONE
        self.guest_policy_sha256 = b""
        self.taken = False
        # Of a signed policy; the guest's own has none.
        self.policy_version = 0
        self.end_of_boot = False
        self.broken = ""
        self.rules = Rules()
        self.rules_before_lock = Rules()
        self.measurements: list[monitor_pb2.Measurement] = []
        self.guard: TableGuard | None = None
        self.frozen_roots: set[int] = set()
        self.kdata = Kdata()
        self.modules: dict[int, list[tuple[ModuleType, Run]]] = {}
        self.next_token = 1
        # By purpose: kexec (False) and kdump (True).
        self.successors: dict[bool, Successor] = {}
        self.grants: list[Action] = []
        # CR0, CR4 and EFER of the first vCPU that was locked, by register name.
        self.locked_values: dict[int, int] = {}
        # Page below 1 MiB -> SHA-256 of it when the policy was locked, where startups depend on it.
        self.low_memory: dict[int, bytes] = {}
        self.filter_version = 1
        # The last filter that lets less pass than the one before it.
        self.strict_version = 1

    @property
    def ready(self) -> bool:
        """A policy is in force."""
        return self.taken and not self.broken

    @property
    def locked(self) -> bool:
        """Nothing but a reset can replace the policy."""
        return self.operator_locked or self.end_of_boot

    def wait_for_turn(self, owner: object) -> None:
        """Waits, with `turn` held, until no other vCPU is in the middle of a service.

        Raises WrongState once the machine was given up.
        """
        if self.serving is not None and self.serving is not owner:
            self.turn.wait_for(lambda: self.closed or self.serving is None)
        if self.closed:
            raise WrongState(self.vm, state="detached", operation="serve VTL1")

    def serve_for(self, owner: object) -> None:
        """Notes whose service is in progress, None for nobody's; `turn` is held."""
        self.serving = owner
        if owner is None:
            self.turn.notify_all()

    @property
    def judging(self) -> object:
        """What judging an exit can change: equal before and after means that it has changed nothing."""
        return (
            self.memory.version,
            len(self.grants),
            self.filter_version,
            self.strict_version,
            self.broken,
            [(one.locked, one.filter_version, one.keeps_pins, sorted(one.window)) for one in self.processors],
            dict(self.locked_values),
        )

    # ------------------------------------------------------------------------------------- what the judge asks

    @property
    def roots(self) -> Set[int]:
        """Page-table bases that may be loaded."""
        return self.guard.root_bases if self.guard is not None and not self.rules.cr3_frozen else self.frozen_roots

    def owner(self, gfn: int) -> str:
        """Name of the rule that covers a page."""
        return self.memory.owner(gfn)

    def at_lock(self, name: int) -> int | None:
        """CR0, CR4 or EFER when registers were locked."""
        return self.locked_values.get(name)

    def is_sealed(self, registers: registers_pb2.Registers, gva: int, size: int) -> bool:
        """Every page is mapped by the tables of that state, and VTL0 can write none of them."""
        translate = self.memory.translator(cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer)
        pages = range(gva & -PAGE_SIZE, gva + size, PAGE_SIZE)
        if not 0 < size <= 0x10000:
            return False
        places = [translate(page) for page in pages]
        return all(place is not None and self.memory.is_sealed(place, PAGE_SIZE) for place in places)

    def read(self, gpa: int, size: int) -> bytes:
        """For rules in code."""
        return self.memory.read(gpa, size)

    def judge(self, vp_index: int, exit_: vcpu_pb2.Exit) -> Verdict:
        """The verdict on an exit of this vCPU, grants and rules in code included; recorded."""
        locked = self.processors[vp_index].locked
        rules = self.rules if locked else self.rules_before_lock
        if exit_.HasField("sleep"):
            verdict = judge_sleep(rules, exit_.sleep)
        elif exit_.HasField("startup"):
            verdict = judge_startup(rules, self, exit_.startup)
        elif exit_.HasField("state_load"):
            verdict = judge_load(rules, self, exit_.state_load)
            if exit_.state_load.cause == vcpu_pb2.STATE_LOAD_CAUSE_WAKE and rules.lifecycle.s3 is SleepMode.VERIFY:
                self.processors[vp_index].sealed = exit_.state_load.before.SerializeToString()
        elif exit_.HasField("machine_check"):
            error = exit_.machine_check
            verdict = judge_poison(self.rules, self.memory.code(error.address // PAGE_SIZE), error)
        elif exit_.HasField("protect"):
            verdict = judge_protection(rules, exit_.protect)
        else:
            verdict = judge(rules, self, exit_)
        if self.processors[vp_index].keeps_pins and exit_.HasField("register_write"):
            verdict = self._kept(vp_index, exit_.register_write, verdict)
        if not verdict.allowed and exit_.origin != vcpu_pb2.ORIGIN_CLIENT:
            verdict = self._granted(exit_, verdict)
        if locked:
            verdict = api.apply(self.code_rules, exit_, verdict, self)
        self.verdicts.record(exit_, verdict.resolution, verdict.rule)
        return verdict

    def _kept(self, vp_index: int, write: vcpu_pb2.RegisterWrite, verdict: Verdict) -> Verdict:
        """A write of a vCPU whose pins VTL1 has set: with the pins, as long as it does not set them itself."""
        if write.name not in KEPT:
            return verdict
        value = kept(self.rules, write.name, write.new_value)
        if verdict.allowed:
            if write.name == registers_pb2.REGISTER_NAME_CR4 and value == write.new_value:
                self.keep_pins(vp_index, on=False)
            return verdict
        kept_write = vcpu_pb2.RegisterWrite(name=write.name, old_value=write.old_value, new_value=value)
        if not judge(self.rules, self, vcpu_pb2.Exit(register_write=kept_write)).allowed:
            return verdict
        reason = f"{verdict.rule}: written with the pins, which VTL1 has set for this startup"
        action = vcpu_pb2.ACTION_REPLACE
        return Verdict(vcpu_pb2.Resolution(action=action, value=value, reason=reason), verdict.rule)

    def keep_pins(self, vp_index: int, *, on: bool = True) -> None:
        """Whether VTL1 keeps the pins for that vCPU, which shows it every change of CR4."""
        self.processors[vp_index].keeps_pins = on
        self.processors[vp_index].filter_version = 0

    def _granted(self, exit_: vcpu_pb2.Exit, verdict: Verdict) -> Verdict:
        if exit_.WhichOneof("reason") not in ("register_write", "msr"):
            return verdict
        for grant in self.grants:
            if verdict.rule in grant.allows:
                self._use_up(grant)
                reason = f"{verdict.resolution.reason}; allowed once by action {grant.name}"
                return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason), verdict.rule)
        return verdict

    # ------------------------------------------------------------------------------------- what holds

    def intercept_filter(self, vp_index: int = 0) -> vcpu_pb2.InterceptFilter:
        """For vCPUs that are locked."""
        result = intercept_filter(self.rules, self.roots, (rule.filter() for rule in self.code_rules))
        if self.end_of_boot and not self.rules.startup.allowed:
            result.startups, result.startup_window = True, True
        if self.processors[vp_index].keeps_pins:
            result.cr4_mask = (1 << 64) - 1
        return result

    def filter_changed(self, *, stricter: bool = True) -> None:
        """Makes every locked vCPU get the new filter with the next VTL return of any of them.

        Args:
            stricter: something exits that did not before, so that no vCPU may run with the old filter.
        """
        self.filter_version += 1
        if stricter:
            self.strict_version = self.filter_version

    def lock_all(self) -> None:
        """The pins hold on every vCPU, also on those that never asked for it.

        They judge changes; what INIT clears is judged as a whole when the vCPU leaves its trampoline.
        """
        for processor in self.processors:
            if not processor.locked:
                processor.locked = True
                processor.filter_version = 0

    def lacks_strict_filter(self, vp_index: int) -> bool:
        """The vCPU is locked and runs with a filter that lets too much pass."""
        processor = self.processors[vp_index]
        return processor.locked and processor.filter_version < self.strict_version

    def pending_filter(self, vp_index: int) -> vcpu_pb2.InterceptFilter | None:
        """The filter that this vCPU lacks; it counts as delivered."""
        processor = self.processors[vp_index]
        if not processor.locked or processor.filter_version == self.filter_version:
            return None
        processor.filter_version = self.filter_version
        return self.intercept_filter(vp_index)

    @property
    def default_code(self) -> int:
        """Rights of memory that no rule names."""
        return rights.INITIAL if self.rules.default_code is None else self.rules.default_code

    def ordinary(self, run: Run) -> Change:
        """The change that makes pages memory that no rule names."""
        return Change(run, self.default_code, self.rules.default_name)

    def by_rules(self, gfn: int) -> Change:
        """The change that makes a page what the last rule that names it says, or ordinary if none does."""
        run = Run(gfn, 1)
        for rule in reversed(self.rules.memory):
            in_force = rule.phase is Phase.LOCK or self.end_of_boot
            if in_force and rule.run.first <= gfn < rule.run.end:
                return Change(run, rule.code, rule.name)
        return self.ordinary(run)

    def is_ordinary(self, run: Run) -> bool:
        """True if VTL0 may write the pages and no named rule covers one of them."""
        codes = self.memory.codes_in(run)
        if codes is None or any(code & rights.STORE_MASK != rights.WRITABLE for code in codes):
            return False
        return all(owner in ("", self.rules.default_name) for _, _, owner in self.memory.pieces(run))

    def lock_changes(self, rules: Rules) -> list[Change]:
        """Protections that hold from TAKE_POLICY on; later ones win."""
        changes = []
        if rules.default_code is not None:
            changes.append(Change(Run(0, self.memory.pages), rules.default_code, rules.default_name))
        for rule in rules.memory:
            if rule.phase is Phase.END_OF_BOOT:
                # Boot still needs it, but what is measured cannot change any more.
                code = rights.READ | rights.KERNEL_EXECUTE | rights.SEALED if rule.measured else rights.INITIAL
                changes.append(Change(rule.run, code, rule.name))
        changes += [Change(rule.run, rule.code, rule.name) for rule in rules.memory if rule.phase is Phase.LOCK]
        return changes

    def end_of_boot_changes(self) -> list[Change]:
        """Protections that hold from SIGNAL_END_OF_BOOT on."""
        return [Change(rule.run, rule.code, rule.name) for rule in self.rules.memory if rule.phase is Phase.END_OF_BOOT]

    def take_grant(self, service: int) -> bool:
        """Uses up a grant for a service, if there is one."""
        for grant in self.grants:
            if service in grant.services:
                self._use_up(grant)
                return True
        return False

    def _use_up(self, grant: Action) -> None:
        self.grants.remove(grant)
        self.tickets.void(self.vm)  # what was sealed still has it

    def break_down(self, reason: str) -> None:
        """From here every service is refused and every intercept halts: what holds is unknown or wrong."""
        self.broken = self.broken or reason

    def status(self) -> monitor_pb2.PolicyStatus:
        """For operators."""
        shown = self.policy or self.override
        status = monitor_pb2.PolicyStatus(
            text=shown.text if shown else "",
            sha256=shown.sha256 if shown else b"",
            source=self.source if self.policy or not self.override else monitor_pb2.POLICY_SOURCE_OPERATOR,
            locked=self.locked,
            rules=render(self.rules) if self.ready else (),
            measurements=self.measurements,
            version=self.policy_version,
        )
        if self.broken:
            status.rules.append(f"everything: halt ({self.broken})")
        return status

    def close(self) -> None:
        """Gives the machine up and leaves no secret: VTL1's pages become zeros, keys are gone, watchers end."""
        with self.turn:
            self.closed = True
            self.turn.notify_all()
            self._wipe()
            self.verdicts.close()

    def stand_down(self) -> None:
        """VTL1 has no secret any more, and answers nothing: the machine is the next kernel's."""
        self.break_down("VTL1 stood down")
        self._wipe()

    def _wipe(self) -> None:
        self.secrets.wipe()
        private = self.memory.ram.views[RamFile.PRIVATE]
        for rule in self.rules.private:
            private[rule.run.first * PAGE_SIZE : rule.run.end * PAGE_SIZE] = bytes(rule.run.pages * PAGE_SIZE)
