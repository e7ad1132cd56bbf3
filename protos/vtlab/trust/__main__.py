"""Makes the certificates of a laboratory: `python -m vtlab.trust FOLDER [--hand-out DESTINATION]`.

With --hand-out each role's part is copied to DESTINATION/ROLE if that folder exists, readable by the folder's group:
for containers, where every role has a uid of its own and a volume that no other role mounts.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role


def hand_out(folder: Path, destination: Path) -> None:
    """Copies ROLE/* of a trust folder to each DESTINATION/ROLE that exists; files are 0640, of the folder's group."""
    for role in Role:
        if not (destination / role).is_dir():
            continue
        for source in sorted((folder / role).iterdir()):
            temporary = destination / role / f".{source.name}"
            shutil.copyfile(source, temporary)
            temporary.chmod(0o640)
            temporary.replace(destination / role / source.name)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vtlab.trust", description="Makes the certificates of a laboratory."
    )
    parser.add_argument("folder", type=Path, help="trust folder, made if missing")
    parser.add_argument(
        "--hand-out", type=Path, metavar="DESTINATION", help="copy each role's part to DESTINATION/ROLE"
    )
    arguments = parser.parse_args()
    folder = ensure_trust(arguments.folder)
    if arguments.hand_out:
        hand_out(folder, arguments.hand_out)


if __name__ == "__main__":
    main()
