"""Exit codes, for scripts.

Our own failures are even, so that `vtlab run` can return the guest's value as QEMU's isa-debug-exit does, which is odd.
1 is for commands that ran and whose answer is no: an attack that succeeded, a policy with problems, a machine unfit.
"""

from __future__ import annotations

from enum import IntEnum

from vtlab import errors


class ExitCode(IntEnum):
    OK = 0
    NEGATIVE = 1
    USAGE = 2
    BAD_INPUT = 4
    WRONG_STATE = 6
    REFUSED = 8
    UNAVAILABLE = 10
    TIMED_OUT = 12
    GUEST_FAILED = 14
    INTERNAL = 70
    INTERRUPTED = 130


OF_ERROR: dict[type[errors.VtlabError], ExitCode] = {
    errors.BadArgument: ExitCode.BAD_INPUT,
    errors.BadImage: ExitCode.BAD_INPUT,
    errors.BadPolicy: ExitCode.BAD_INPUT,
    errors.LimitExceeded: ExitCode.BAD_INPUT,
    errors.WrongState: ExitCode.WRONG_STATE,
    errors.NotFound: ExitCode.WRONG_STATE,
    errors.AlreadyExists: ExitCode.WRONG_STATE,
    errors.Conflict: ExitCode.WRONG_STATE,
    errors.PermissionDenied: ExitCode.REFUSED,
    errors.Refused: ExitCode.REFUSED,
    errors.Unsupported: ExitCode.REFUSED,
    errors.PeerUnavailable: ExitCode.UNAVAILABLE,
    errors.Cancelled: ExitCode.UNAVAILABLE,
    errors.TimedOut: ExitCode.TIMED_OUT,
    errors.GuestMisbehaved: ExitCode.GUEST_FAILED,
    errors.GuestLost: ExitCode.GUEST_FAILED,
    errors.InternalError: ExitCode.INTERNAL,
}


def of_error(error: errors.VtlabError) -> ExitCode:
    """The code of an error, by its nearest base in the table."""
    return next((OF_ERROR[kind] for kind in type(error).__mro__ if kind in OF_ERROR), ExitCode.INTERNAL)


def of_debug_exit(value: int) -> int:
    """What QEMU exits with when the guest writes `value` to isa-debug-exit, as a shell sees it: 8 bits."""
    return ((value << 1) | 1) & 0xFF
