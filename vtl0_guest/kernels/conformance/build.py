"""Builds the conformance guest, to the same bytes wherever gcc and binutils are of the same version.

`python -m vtl0_guest.kernels.conformance.build [FOLDER]` writes conformance.elf and, in toolchain.txt, the versions
that made it; without FOLDER beside the sources. Raises as vtl0_guest.kernels.selfguard.build.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vtl0_guest.kernels.selfguard.build import build_kernel, toolchain

SOURCE = Path(__file__).resolve().parent


def build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        build_kernel(folder / "conformance.elf", Path(temporary), SOURCE)
    (folder / "toolchain.txt").write_text(toolchain())


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SOURCE)
