"""`python -m vtl1_monitor --listen ADDRESS --listen ADDRESS --trust FOLDER --state FOLDER --memory FOLDER`"""

from __future__ import annotations

import sys

from vtl1_monitor.server import main
from vtlab.arguments import run_server
from vtlab.trust.roles import Role

if __name__ == "__main__":
    sys.exit(run_server(Role.MONITOR, main))
