"""What VTL1 knows of a machine as bytes and back, for the sealed store.

The content is pickled: it is many kinds of plain values, and only bytes that this monitor has sealed itself are ever
loaded. Even so, only classes of the monitor and of the contract are. What belongs to the process and not to the machine
stays out: mappings of RAM, the boot image, locks, rules in Python, the log of verdicts.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from vtl1_monitor.machine import Machine
from vtl1_monitor.policy.text import PolicyText, parse
from vtl1_monitor.tickets import Ticket

_PROCESS = frozenset(
    {"memory", "image", "turn", "serving", "closed", "verdicts", "code_rules", "vm", "generation", "tickets"}
)
_CLASSES_OF = ("vtl1_monitor.", "vtlab.")
_PLAIN = {
    "builtins": {"set", "frozenset", "bytearray", "object", "getattr"},
    "array": {"array", "_array_reconstructor"},
    "collections": {"Counter", "OrderedDict", "deque"},
    "copyreg": {"_reconstructor", "__newobj__"},
}
_CERTIFICATE, _POLICY = "certificate", "policy"


@dataclass
class Interrupted:
    """A service that waits for protections.

    Attributes:
        vp_index: of its vCPU.
        enter: that it began with, serialized.
        asked: what it has asked for so far, serialized Protects in order.
    """

    vp_index: int
    enter: bytes
    asked: list[bytes] = field(default_factory=list)


@dataclass
class Sealed:
    """All that the store holds.

    Attributes:
        request: the AttachRequest, serialized; b"" if no machine is attached.
        machine: by dump(), as it was when no service was in progress.
        sessions: of each vCPU, number, enter and exit of its last enter, serialized.
        interrupted: None if no service is in progress.
        overrides: operators' policies: name of the machine -> text and file name.
        tickets: what may be restored, by name of the machine.
    """

    request: bytes = b""
    machine: bytes = b""
    sessions: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    interrupted: Interrupted | None = None
    overrides: dict[str, tuple[str, str]] = field(default_factory=dict)
    tickets: dict[str, Ticket] = field(default_factory=dict)


def _of_the_process(machine: Machine | None) -> dict[str, Any]:
    """Objects that the state refers to and that the process that loads it has of its own."""
    return {"machine": machine, "memory": machine.memory, "ram": machine.memory.ram} if machine is not None else {}


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, machine: Machine | None) -> None:
        super().__init__(file, protocol=5)
        self._process = _of_the_process(machine)

    def persistent_id(self, value: Any) -> Any:
        for name, known in self._process.items():
            if value is known:
                return (name,)
        if isinstance(value, PolicyText):
            return _POLICY, value.text, value.file_name
        if isinstance(value, x509.Certificate):
            return _CERTIFICATE, value.public_bytes(Encoding.DER)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, machine: Machine | None) -> None:
        super().__init__(file)
        self._process = _of_the_process(machine)
        self._policies: dict[tuple[str, ...], PolicyText] = {}

    def persistent_load(self, identity: Any) -> Any:
        kind, *arguments = identity
        if kind == _POLICY:  # the same text is the same object again
            return self._policies.setdefault(tuple(arguments), parse(*arguments))
        if kind == _CERTIFICATE:
            return x509.load_der_x509_certificate(*arguments)
        return self._process[kind]

    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith(_CLASSES_OF) and name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a machine")
        return super().find_class(module, name)


def _dump(value: Any, machine: Machine | None) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, machine).dump(value)
    return buffer.getvalue()


def dump(machine: Machine) -> bytes:
    """The state of a machine in whose VTL1 no service is in progress. The same state gives the same bytes."""
    memory = machine.memory
    state = {name: value for name, value in vars(machine).items() if name not in _PROCESS}
    pages = bytes(memory.codes), memory.owners()
    return _dump((state, pages, machine.secrets.block), machine)


def load(machine: Machine, data: bytes) -> None:
    """Gives a new Machine that state, and VTL1's memory in the guest the keys that it had."""
    memory = machine.memory
    state, (codes, owners), secrets = _load(data, machine)
    memory.codes[:] = codes
    memory.set_owners(owners)
    vars(machine).update(state)
    machine.secrets.block = secrets
    if machine.guard is not None:
        machine.guard.recount()


def pages_of(machine: Machine, data: bytes) -> tuple[bytes, tuple[bytes, list[str]]]:
    """What load() would make of pages: their codes, and owners as of GuestMemory.owners()."""
    _, pages, _ = _load(data, machine)
    return pages  # type: ignore[no-any-return]


def override_of(machine: Machine, data: bytes) -> str | None:
    """Text of the operator's policy that load() would bring back."""
    state, _, _ = _load(data, machine)
    override: PolicyText | None = state["override"]
    return override.text if override is not None else None


def _load(data: bytes, machine: Machine | None) -> Any:
    return _Unpickler(io.BytesIO(data), machine).load()


Value = TypeVar("Value")


def dump_value(value: object) -> bytes:
    """Something of the monitor's own that refers to nothing of the process."""
    return _dump(value, None)


def load_value(data: bytes, kind: type[Value]) -> Value:
    """The inverse. Raises pickle.UnpicklingError, or whatever a content of another version leads to."""
    value = _load(data, None)
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"is no {kind.__name__}")
    return value
