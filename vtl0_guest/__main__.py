"""`python -m vtl0_guest`: the process of VTL0 for one machine."""

from __future__ import annotations

import sys

from vtl0_guest.server import main
from vtlab.arguments import run_server
from vtlab.trust.roles import Role

if __name__ == "__main__":
    sys.exit(run_server(Role.GUEST, main))
