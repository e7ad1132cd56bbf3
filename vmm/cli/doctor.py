"""`vtlab doctor`: is this machine fit for a laboratory, and what to do where it is not."""

from __future__ import annotations

import sys

from vmm.cli import checks, options
from vmm.cli.exit_codes import ExitCode
from vmm.cli.output import print_json, progress

_SIGNS = {checks.Level.OK: "ok  ", checks.Level.WARNING: "warn", checks.Level.FAILURE: "FAIL"}


def doctor(as_json: options.Json = False) -> int:
    """Check Python, packages, memory, ports, and boot a tiny guest; exit code 1 if something must be mended."""
    with progress("checking; a tiny guest boots", as_json):
        findings = [check() for check in checks.ALL]
    if as_json:
        print_json(
            [{"check": one.name, "level": one.level.value, "detail": one.detail, "fix": one.fix} for one in findings]
        )
    else:
        for one in findings:
            sys.stdout.write(f"{_SIGNS[one.level]} {one.name}: {one.detail}\n")
            if one.fix:
                sys.stdout.write(f"     fix: {one.fix}\n")
    failed = any(one.level is checks.Level.FAILURE for one in findings)
    return ExitCode.NEGATIVE if failed else ExitCode.OK
