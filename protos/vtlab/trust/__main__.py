"""`python -m vtlab.trust FOLDER [--hand-out OTHER]`: makes the certificates of a laboratory.

With --hand-out each role's part is also copied to OTHER/ROLE, for those roles whose folder is there already (a volume
of its container); the copies are readable by the folder's group.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtlab.trust.certificates import ensure_trust, hand_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hand-out", type=Path, metavar="OTHER")
    given = parser.parse_args(arguments)
    try:
        ensure_trust(given.folder)
        if given.hand_out is not None:
            hand_out(given.folder, given.hand_out)
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
