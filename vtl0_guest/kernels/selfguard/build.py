"""Builds the kernel and its module, to the same bytes wherever gcc and binutils are of the same version.

`python -m vtl0_guest.kernels.selfguard.build [FOLDER]` writes selfguard.elf, module.elf, module.signed.elf and, in
toolchain.txt, the versions that made them; without FOLDER beside the sources. Raises subprocess.CalledProcessError
where a tool refuses, ValueError where the image breaks a rule that its loaders count on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

from vtlab.services import MODULE_SIGNATURE, MODULE_SIGNATURE_MAGIC, PKEY_ID_PKCS7

SOURCE = Path(__file__).resolve().parent
FREESTANDING = [
    *("gcc", "-std=gnu11", "-O2", "-g0", "-I.", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-builtin", "-fno-common", "-fno-ident", "-fno-strict-aliasing", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-jump-tables", "-fno-tree-loop-distribute-patterns"),
    *("-fcf-protection=none", "-mno-red-zone", "-mgeneral-regs-only"),
]
COMPILE = [*FREESTANDING, "-fno-pic", "-fno-pie", "-mcmodel=kernel"]
ASSEMBLE = [*COMPILE, "-Wa,--noexecstack", "-Wa,-mx86-used-note=no"]
MODULE_COMPILE = [*FREESTANDING, "-fpie"]
LINK = [
    *("ld", "-m", "elf_x86_64", "-nostdlib", "-static", "--build-id=none", "--no-warn-rwx-segments"),
    *("-z", "max-page-size=0x1000", "-z", "noexecstack"),
]


def run(command: list[str], folder: Path = SOURCE) -> None:
    # A fixed clock, locale and folder: nothing of the place of building reaches the bytes.
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"})


def toolchain() -> str:
    """First lines of what compiler and linker say of themselves. Raises FileNotFoundError if one is missing."""
    answers = [
        subprocess.run([tool, "--version"], check=True, capture_output=True, text=True) for tool in ("gcc", "ld")
    ]
    return "".join(answer.stdout.splitlines()[0] + "\n" for answer in answers)


def check(image: Path) -> None:
    """From image_start on the file must be the memory image, without gaps: multiboot's address fields say no more."""
    with image.open("rb") as stream:
        elf = ELFFile(stream)
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_filesz"]]
        shifts = {s["p_paddr"] - s["p_offset"] for s in segments}
    if len(shifts) != 1:
        raise ValueError(f"{image.name}: segments at {len(shifts)} different distances from their place in the file")


def build_kernel(output: Path, objects: Path, folder: Path = SOURCE) -> None:
    """All C and assembly of `folder`, linked by the script there."""
    sources = sorted([*folder.glob("*.c"), *folder.glob("*.S")])
    for source in sources:
        options = ASSEMBLE if source.suffix == ".S" else COMPILE
        run([*options, "-c", source.name, "-o", str(objects / f"{source.stem}.o")], folder)
    script = next(folder.glob("*.ld")).name
    linked = [str(objects / f"{source.stem}.o") for source in sources]
    run([*LINK, "-T", script, "-o", str(output), *linked], folder)
    check(output)
    output.chmod(0o644)


def build_module(output: Path, objects: Path) -> None:
    run([*MODULE_COMPILE, "-c", "module/module.c", "-o", str(objects / "module.o")])
    run([*LINK, "-s", "-T", "module/module.ld", "-o", str(output), str(objects / "module.o")])
    output.chmod(0o644)


def append_signature(module: bytes, signature: bytes) -> bytes:
    """A module file as the kernel and VTL1 take it (Linux include/linux/module_signature.h)."""
    trailer = MODULE_SIGNATURE.pack(0, 0, PKEY_ID_PKCS7, 0, 0, len(signature))
    return module + signature + trailer + MODULE_SIGNATURE_MAGIC


def build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        build_kernel(folder / "selfguard.elf", Path(temporary))
        build_module(folder / "module.elf", Path(temporary))
    signature = (SOURCE / "module/module.cms").read_bytes()
    (folder / "toolchain.txt").write_text(toolchain())
    (folder / "module.signed.elf").write_bytes(append_signature((folder / "module.elf").read_bytes(), signature))


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SOURCE)
