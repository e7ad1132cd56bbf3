"""`vtlab-qemu`: stands in for QEMU under test runners such as kvm-unit-tests' (QEMU=vtlab-qemu ./run_tests.sh).

Exit codes are QEMU's: (value << 1) | 1 after a debug exit, 0 when the machine ended otherwise, 1 with a line on stderr
when something is wrong. With VTLAB_VMM set, the machine runs in that laboratory instead of one of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from vmm.cli import qemu_arguments
from vmm.cli.boot import Boot, boot
from vmm.cli.exit_codes import ExitCode
from vmm.cli.laboratory import given_or_private
from vmm.cli.output import print_error
from vmm.cli.qemu_arguments import Arguments, Query
from vmm.cli.qemu_cpu import HYPERV, SHOWN
from vtlab.errors import VtlabError, one_line

FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one machine, or answers a question; returns the exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        asked = qemu_arguments.parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(asked, Query):
            sys.stdout.write(ANSWERS[asked.about]())
            return 0
        return _run(asked)
    except VtlabError as error:
        print_error(str(error))
    except OSError as error:
        print_error(one_line(f"{error.filename or 'system'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return FAILED


def _run(asked: Arguments) -> int:
    for warning in asked.features.warnings:
        print_error(f"warning: {warning}")
    what = Boot(
        image=asked.kernel,
        ram=asked.ram,
        processors=asked.processors,
        command_line=asked.command_line,
        modules=asked.modules,
        serial=asked.serial,
        no_reboot=asked.no_reboot,
        devices=asked.devices,
        vtl1=asked.features.vsm,
        guest_vtl1=asked.features.vsm,
        vsm_profile="kvm" if asked.features.vsm else "",
    )
    code = boot(what, given_or_private("", "", ""))
    return FAILED if code == ExitCode.GUEST_FAILED else code


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """The words that runners look for, and a quick end: they kill a second later.

    Processes of our own end with this one, and remove their folder; a machine elsewhere has to be destroyed.
    """
    print_error(f"terminating on signal {number}")
    if not os.environ.get("VTLAB_VMM"):
        os._exit(0)
    raise SystemExit(0)


def _version() -> str:
    from importlib.metadata import version

    return f"QEMU stand-in version {version('vtlab')} (vtlab)\n"


def _help() -> str:
    taken = [f"  -{name}{' VALUE' if has_value else ''}" for name, has_value in qemu_arguments.MEANINGFUL.items()]
    ignored = [f"-{name}" for name in qemu_arguments.MEANINGLESS]
    return (
        f"{_version()}usage: vtlab-qemu -kernel IMAGE [options], as for QEMU\n\n"
        + "\n".join(taken)
        + "\n  -device, -machine, -accel, -cpu with ? list what they take\n\n"
        + f"without effect: {', '.join(ignored)}\n"
    )


def _devices() -> str:
    return "".join(f'name "{name}"\n' for name in qemu_arguments.DEVICES)


def _machines() -> str:
    names = qemu_arguments.MACHINES
    return "Supported machines are:\n" + "".join(
        f"{name:<8}devices of an early PC and ACPI, no PCI\n" for name in names
    )


def _accelerators() -> str:
    return "Accelerators supported:\n" + "".join(f"{name}\n" for name in qemu_arguments.ACCELERATORS)


def _processors() -> str:
    return (
        "Available CPUs:\n  max     the one processor; any other name means it too\n\n"
        f"Features it shows:\n  {' '.join(SHOWN)}\n\n"
        f"Hyper-V features that are accepted:\n  {' '.join(HYPERV)}\n"
    )


ANSWERS: dict[str, Callable[[], str]] = {
    "version": _version,
    "help": _help,
    "device": _devices,
    "machine": _machines,
    "accel": _accelerators,
    "cpu": _processors,
}

if __name__ == "__main__":
    sys.exit(main())
