"""Asks a server for its health with its own certificate: `python -m vtlab.health ADDRESS ROLE TRUST`.

For containers, which hold the key of their own role and no other. Exit code 0: it serves; 1: it does not, and a line on
standard error says why.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtlab.channels import dial
from vtlab.errors import VtlabError

TIMEOUT = 3.0  # seconds


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) != 3:
        print("usage: python -m vtlab.health ADDRESS ROLE TRUST", file=sys.stderr)  # noqa: T201
        return 2
    address, role, trust = arguments
    try:
        dial(address, Path(trust), role, role, timeout=TIMEOUT).close()
    except VtlabError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
