"""Assembles the guest: `python -m vtl0_guest.kernels.chaos.build [FOLDER]` writes chaos.bin, a flat image for LOAD."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD, PAGE = 0x10_0000, 0x1000
SOURCE = Path(__file__).resolve().parent


def build(folder: Path) -> None:
    """Raises subprocess.CalledProcessError, and ValueError if the code does not fit the page that is sealed."""
    image = folder / "chaos.bin"
    environment = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    with tempfile.TemporaryDirectory() as objects:
        made = f"{objects}/chaos.o"
        assemble = ["gcc", "-c", "-Wa,--noexecstack", "-Wa,-mx86-used-note=no", "chaos.S", "-o", made]
        link = ["ld", "-m", "elf_x86_64", "-nostdlib", "-static", "--build-id=none", f"-Ttext={LOAD:#x}"]
        subprocess.run(assemble, cwd=SOURCE, check=True, env=environment)
        subprocess.run(
            [*link, "--oformat", "binary", "-e", "_start", made, "-o", str(image)], check=True, env=environment
        )
    image.chmod(0o644)
    if image.stat().st_size > PAGE:
        raise ValueError(f"{image.name} has {image.stat().st_size} bytes, more than a page")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SOURCE)
