"""What can go wrong, as one hierarchy of exceptions that all processes and the client share.

Each error names the thing at fault (`subject`: a file, a machine, a register, an address) and says what is wrong with
it (`detail`); subclasses add the fields that a caller acts on. `str()` is one line. A refusal by policy is no error: it
is a verdict inside an answer. `vtlab.status` maps these types to gRPC and back; this module knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self


def one_line(text: str) -> str:
    """The text without line breaks or repeated spaces, for logs and terminals."""
    return " ".join(text.split())


class VtlabError(Exception):
    """Base of all errors of this package.

    Attributes:
        subject: the thing at fault, as its user knows it.
        detail: what is wrong with it.
        extra_fields: names and types of the further fields of a subclass; they travel over gRPC as text.
    """

    extra_fields: ClassVar[dict[str, type[str] | type[int]]] = {}

    def __init__(self, subject: str, detail: str) -> None:
        super().__init__(subject, detail)
        self.subject = subject
        self.detail = detail

    def __str__(self) -> str:
        return one_line(f"{self.subject}: {self.detail}" if self.subject else self.detail)

    def fields(self) -> dict[str, str]:
        """All fields as text, `subject` and `detail` included."""
        values = {"subject": self.subject, "detail": self.detail}
        return values | {name: str(getattr(self, name)) for name in self.extra_fields}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Self:
        """The inverse of fields(). The text is a peer's: what is missing or malformed takes its type's empty value."""
        error = cls(fields.get("subject", ""), fields.get("detail", ""))
        for name, kind in cls.extra_fields.items():
            try:
                setattr(error, name, kind(fields.get(name, "")))
            except ValueError:
                setattr(error, name, kind())
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.fields())


def _rebuild(kind: type[VtlabError], fields: Mapping[str, str]) -> VtlabError:
    return kind.from_fields(fields)


class BadArgument(VtlabError):
    """A request is malformed or out of range; the subject names the field."""


class BadImage(VtlabError):
    """A boot image or module cannot be read or booted; the subject is the file, the detail names its field."""


class BadPolicy(VtlabError):
    """A policy cannot be parsed or resolved.

    Attributes:
        line: in the policy text, from 1; 0 if no line is to blame.
        key: dotted path, "memory.2.section".
    """

    extra_fields: ClassVar = {"line": int, "key": str}

    def __init__(self, subject: str, detail: str, *, line: int = 0, key: str = "") -> None:
        super().__init__(subject, detail)
        self.line = line
        self.key = key

    def __str__(self) -> str:
        place = self.subject + (f":{self.line}" if self.line else "")
        return one_line(": ".join(part for part in (place, self.key, self.detail) if part))


class WrongState(VtlabError):
    """The operation is not legal in the state that the subject is in.

    Attributes:
        state: the state it is in.
        operation: what was asked.
    """

    extra_fields: ClassVar = {"state": str, "operation": str}

    def __init__(self, subject: str, detail: str = "", *, state: str = "", operation: str = "") -> None:
        super().__init__(subject, detail or f"cannot {operation or 'do that'} while {state or 'in this state'}")
        self.state = state
        self.operation = operation


class NotFound(VtlabError):
    """There is no such machine, image, register, symbol."""


class AlreadyExists(VtlabError):
    """The name is taken."""


class PermissionDenied(VtlabError):
    """The caller's role may not do this at all (vtlab.trust.roles)."""


class Refused(VtlabError):
    """What a client asked is what VTL0 itself may not do: VTL1 or the page's rights forbid it.

    Attributes:
        rule: the rule that decided, or "".
        gpa: guest-physical address of the first byte at fault; 0 where no memory is meant.
    """

    extra_fields: ClassVar = {"rule": str, "gpa": int}

    def __init__(self, subject: str, detail: str, *, rule: str = "", gpa: int = 0) -> None:
        super().__init__(subject, detail)
        self.rule = rule
        self.gpa = gpa


class PeerUnavailable(VtlabError):
    """Another process cannot be reached, or went away in the middle of a call. The subject is its role and address."""


class TimedOut(VtlabError):
    """What was waited for did not happen in time.

    Attributes:
        seconds: how long was waited, as text.
    """

    extra_fields: ClassVar = {"seconds": str}

    def __init__(self, subject: str, detail: str, *, seconds: float | str = "") -> None:
        super().__init__(subject, detail)
        self.seconds = str(seconds)


class GuestMisbehaved(VtlabError):
    """The process of a level answered what the contract forbids; nothing that it says is to be believed any more."""


class GuestLost(GuestMisbehaved):
    """By the machine's state, the guest never comes back by itself: it resets for ever, or runs where no code is."""


class LimitExceeded(VtlabError):
    """A bound was reached.

    Attributes:
        limit: the bound, in the unit that the detail names.
    """

    extra_fields: ClassVar = {"limit": int}

    def __init__(self, subject: str, detail: str, *, limit: int = 0) -> None:
        super().__init__(subject, detail)
        self.limit = limit


class Conflict(VtlabError):
    """Someone else changed the same thing first: a stale generation, sequence number or lock."""


class Unsupported(VtlabError):
    """Known, but not offered here."""


class Cancelled(VtlabError):
    """The call was given up before it ended."""


class InternalError(VtlabError):
    """A defect of this package. The subject is the process, the detail the exception; its log has the traceback."""
