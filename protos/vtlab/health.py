"""Is a server serving? `python -m vtlab.health ADDRESS ROLE TRUST` exits with 0 if it is, for container health checks.

It asks with the certificate of the server's own role, the only one that its container holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtlab.channels import dial
from vtlab.errors import VtlabError
from vtlab.trust.roles import Role


def main(arguments: list[str] | None = None) -> int:
    """0 if the server at the address serves, else 1 and a line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("role", choices=[role.value for role in Role])
    parser.add_argument("trust", type=Path)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds")
    given = parser.parse_args(arguments)
    try:
        dial(given.address, given.trust, given.role, given.role, given.timeout).close()
    except VtlabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
