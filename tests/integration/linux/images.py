"""Debian's kernel as a guest, and an initial RAM disk: where they are, and how `make linux` makes them from packages.

Nothing of them is ours or committed: the folder lies below build/, or where VTLAB_LINUX says.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.integration.linux.cpio import CHARACTER_DEVICE, DIRECTORY, PROGRAM, Entry, archive

_ROOT = Path(__file__).parents[3]
_KERNEL_PACKAGE, _BUSYBOX_PACKAGE = "linux-image-cloud-amd64", "busybox-static"
_APT_LISTS = Path("/var/lib/apt/lists")


class Images(NamedTuple):
    """The files; `version` is the kernel's release."""

    kernel: Path
    initrd: Path
    version: str


def folder() -> Path:
    return Path(os.environ.get("VTLAB_LINUX") or _ROOT / "build" / "linux")


def find() -> Images | None:
    """The images, if `make linux` has made them."""
    where = folder()
    kernels = sorted(where.glob("vmlinuz-*"))
    initrd = where / "initrd.cpio"
    if not kernels or not initrd.is_file():
        return None
    return Images(kernels[-1], initrd, kernels[-1].name.removeprefix("vmlinuz-"))


def initrd(busybox: bytes) -> bytes:
    """A root file system of one program and the script beside this file."""
    script = Path(__file__).with_name("init.sh").read_bytes()
    return archive(
        [
            *(Entry(name, DIRECTORY) for name in ("bin", "dev", "proc", "sys")),
            Entry("dev/console", CHARACTER_DEVICE, device=(5, 1)),
            Entry("bin/busybox", PROGRAM, busybox),
            Entry("init", PROGRAM, script),
        ]
    )


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def _kernel_package() -> str:
    """The package of the newest kernel, which the one without a version depends on."""
    match = re.search(r"Depends: (linux-image-\S+)", _run("apt-cache", "depends", _KERNEL_PACKAGE))
    if match is None:
        raise SystemExit(f"apt knows no kernel behind {_KERNEL_PACKAGE}")
    return match[1]


def make() -> Images:
    """Downloads the packages and takes kernel and BusyBox out of them. Needs apt and dpkg-deb; installs nothing."""
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    if not any(_APT_LISTS.glob("*_Packages*")):
        _run("apt-get", "update")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _run("apt-get", "--quiet", "download", _kernel_package(), _BUSYBOX_PACKAGE, cwd=work)
        for package in work.glob("*.deb"):
            _run("dpkg-deb", "--extract", str(package), str(work / "files"))
        kernel = next((work / "files" / "boot").glob("vmlinuz-*"))
        for old in where.glob("vmlinuz-*"):
            old.unlink()
        shutil.copyfile(kernel, where / kernel.name)
        (where / "initrd.cpio").write_bytes(initrd(next((work / "files").glob("**/bin/busybox")).read_bytes()))
    found = find()
    assert found is not None
    return found


if __name__ == "__main__":
    try:
        made = make()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"cannot get the kernel: {error}")
    sys.stdout.write(f"Linux {made.version} in {made.kernel.parent}\n")
