"""`python -m vmm`: see --help."""

import sys

from vmm.server import main
from vtlab.arguments import run_server
from vtlab.trust.roles import Role

if __name__ == "__main__":
    sys.exit(run_server(Role.VMM, main))
