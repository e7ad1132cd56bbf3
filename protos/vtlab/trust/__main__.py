"""`python -m vtlab.trust FOLDER`: makes the certificates of a laboratory, renews them, and takes them back.

With --hand-out each role's part is also copied to OTHER/ROLE, for those roles whose folder is there already (a volume
of its container); the copies are readable by the folder's group. Servers notice changes without a restart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtlab.errors import VtlabError
from vtlab.trust.certificates import ensure_trust, hand_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vtlab.trust", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hand-out", type=Path, metavar="OTHER")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--renew", action="store_true", help="new keys and certificates for every role")
    change.add_argument("--add-authority", action="store_true", help="one that issues from now on, beside those before")
    change.add_argument("--retire-authorities", action="store_true", help="believe in the one that issues alone")
    change.add_argument(
        "--revoke", metavar="CERTIFICATE", help="take back: a PEM file, or a serial number in hexadecimal"
    )
    given = parser.parse_args(arguments)
    try:
        ensure_trust(given.folder)
        _change(given)
        if given.hand_out is not None:
            hand_out(given.folder, given.hand_out)
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}\n")
        return 1
    except VtlabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _change(given: argparse.Namespace) -> None:
    from vtlab.trust import rotation

    if given.renew:
        rotation.renew(given.folder)
    elif given.add_authority:
        rotation.add_authority(given.folder)
    elif given.retire_authorities:
        rotation.retire_authorities(given.folder)
    elif given.revoke is not None:
        serial = rotation.revoke(given.folder, given.revoke)
        sys.stdout.write(f"revoked {serial:x}\n")


if __name__ == "__main__":
    sys.exit(main())
