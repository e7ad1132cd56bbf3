"""Options of `vtlab run` that mean what they mean to QEMU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vtlab.errors import BadArgument

RAM_GRANULE = 2 << 20  # bytes; the contract's
_UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_ram(text: str) -> int:
    """Bytes meant by -m: a number in MiB, or with a unit B, K, M, G or T; also size=…. Raises BadArgument."""
    match = re.fullmatch(r"(?:size=)?(\d+)([BKMGT]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadArgument(f"-m {text}", "expected a size as 64M or 1G")
    size = int(match[1]) * _UNITS[match[2].upper()]
    if size == 0 or size % RAM_GRANULE:
        raise BadArgument(f"-m {text}", "RAM must be a multiple of 2 MiB")
    return size


@dataclass(frozen=True)
class SerialTarget:
    """Where a serial port goes: our stdio, a file, or nowhere (both unset)."""

    stdio: bool = False
    file: Path | None = None


def parse_serial(options: list[str]) -> tuple[SerialTarget, SerialTarget]:
    """Targets of COM1 and COM2 by -serial, given up to twice: stdio, file:PATH, null or none. Raises BadArgument.

    Without any, COM1 is stdio; a port without an option of its own is null.
    """
    targets = [_serial_target(option) for option in options or ["stdio"]]
    if len(targets) > 2:
        raise BadArgument(f"-serial {options[2]}", "there are only two serial ports")
    if sum(target.stdio for target in targets) > 1:
        raise BadArgument("-serial stdio", "can be given to one port only")
    targets += [SerialTarget()] * (2 - len(targets))
    return targets[0], targets[1]


def parse_design_options(options: list[str]) -> dict[str, str]:
    """Switches of a design, NAME=VALUE each. Raises BadArgument."""
    switches: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not name or not equals:
            raise BadArgument(f"--design-option {option}", "expected NAME=VALUE")
        switches[name] = value
    return switches


def _serial_target(option: str) -> SerialTarget:
    kind, colon, path = option.partition(":")
    if option in ("stdio", "mon:stdio"):
        return SerialTarget(stdio=True)
    if option in ("null", "none"):
        return SerialTarget()
    if kind == "file" and colon and path:
        return SerialTarget(file=Path(path))
    raise BadArgument(f"-serial {option}", "expected stdio, file:PATH, null or none")


@dataclass(frozen=True)
class FlatStart:
    """Where a flat image is put and entered, and in which mode: "real", "protected" or "long"."""

    address: int
    mode: str


def parse_flat(text: str) -> FlatStart | None:
    """What --flat ADDRESS[,MODE] means; None if it is not given. Raises BadArgument."""
    if not text:
        return None
    address, _, mode = text.partition(",")
    mode = mode or "real"
    try:
        number = int(address, 0)
    except ValueError:
        raise BadArgument(f"--flat {text}", f"{address!r} is not an address") from None
    if number < 0 or mode not in ("real", "protected", "long"):
        raise BadArgument(f"--flat {text}", "expected ADDRESS,MODE with MODE one of real, protected, long")
    return FlatStart(number, mode)


def parse_modules(text: str) -> list[tuple[str, str]]:
    """Files and command lines of -initrd for multiboot: "FILE ARGUMENTS,FILE ARGUMENTS", where ,, is a comma."""
    parts = text.replace(",,", "\0").split(",") if text else []
    pairs = [part.replace("\0", ",").strip().partition(" ") for part in parts]
    return [(file, f"{file} {arguments}".strip()) for file, _, arguments in pairs if file]
