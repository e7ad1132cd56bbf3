"""Guest kernels of our own: each a folder with its sources, its build script and the images made from them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def _file(kernel: str, name: str) -> Path:
    path = Path(str(files(__name__).joinpath(kernel, name)))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the package lacks the prebuilt {kernel} file")
    return path


def selfguard_image() -> Path:
    """The kernel that asks VTL1 for its own protection: ELF64, multiboot 1."""
    return _file("selfguard", "selfguard.elf")


def signed_module() -> Path:
    """A module that selfguard's certificate vouches for."""
    return _file("selfguard", "module.signed.elf")


def unsigned_module() -> Path:
    """The same module without its signature."""
    return _file("selfguard", "module.elf")


def chaos_image() -> Path:
    """The guest whose work can be checked from outside: flat, long mode (vmm.chaos.guest has its layout)."""
    return _file("chaos", "chaos.bin")
