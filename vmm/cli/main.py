"""`vtlab`: commands, and what their failures look like: one line on stderr and an exit code (vmm.cli.exit_codes)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from vmm.cli import attack, attest, chaos, conformance, doctor, inspect, matrix, policy, run, up
from vmm.cli.exit_codes import ExitCode, of_error
from vmm.cli.output import print_error
from vtlab.errors import VtlabError, one_line

app = typer.Typer(
    name="vtlab",
    help="A laboratory for Virtual Trust Levels: real x86-64 guests at VTL0, a monitor at VTL1, and a VMM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the answer is no, 2 usage, 4 bad input, 6 wrong state or name, 8 refused, "
    "10 nobody there, 12 timed out, 14 the guest failed, 70 a defect of ours. "
    "`run` returns (value << 1) | 1 if the guest wrote value to port 0xF4.",
)
app.command("demo")(attack.demo)
app.command("attack")(attack.attack)
app.command("matrix")(matrix.matrix)
app.command("run")(run.run)
app.command("up")(up.up)
app.command("guard")(policy.guard)
app.command("events")(inspect.events)
app.command("regs")(inspect.regs)
app.command("mem")(inspect.mem)
app.add_typer(policy.app, name="policy")
app.command("quote")(attest.quote)
app.command("verify")(attest.verify)
app.command("conformance")(conformance.conformance)
app.command("chaos")(chaos.chaos)
app.command("doctor")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say, our errors say
    signal.signal(signal.SIGTERM, _terminate)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(run.with_seed(given) if given[:1] == ["run"] else given, standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.INTERNAL
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - the last resort: no traceback for users
        return _fail(error)
    return int(code or 0)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like an exception, so that nothing is left running."""
    raise SystemExit(128 + signal.SIGTERM)


def _fail(error: Exception) -> int:
    if isinstance(error, VtlabError):
        print_error(str(error))
        return of_error(error)
    if isinstance(error, OSError):
        print_error(one_line(f"{error.filename or 'system'}: {error.strerror or error}"))
        return ExitCode.BAD_INPUT
    usage = getattr(error, "format_message", None)
    if usage is not None:
        print_error(one_line(f"{usage()} (see --help)"))
        return ExitCode.USAGE
    if os.environ.get("VTLAB_DEBUG"):
        raise error
    print_error(one_line(f"internal error: {type(error).__name__}: {error} (VTLAB_DEBUG=1 shows where)"))
    return ExitCode.INTERNAL


if __name__ == "__main__":
    sys.exit(main())
