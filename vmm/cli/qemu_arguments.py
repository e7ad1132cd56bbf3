"""The command line of `vtlab-qemu`: the options of QEMU that test runners pass, by tables.

An option with one dash or two is the same. One that is in no table, or a value that this machine cannot honour, is an
error that names it. Options in MEANINGLESS are taken and change nothing: what they speak of does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmm.cli.qemu_cpu import Features, parse_cpu
from vmm.cli.qemu_options import SerialTarget, parse_modules, parse_ram, parse_serial
from vtlab.errors import BadArgument

DEFAULT_RAM = 128 << 20  # bytes; QEMU's

# Device -> its properties -> the values that this machine has. All but hyperv-testdev are always there.
DEVICES: dict[str, dict[str, tuple[str, ...]]] = {
    "pc-testdev": {},
    "isa-debug-exit": {"iobase": ("0xf4",), "iosize": ("0x1", "0x2", "0x4", "1", "2", "4")},
    "hyperv-testdev": {},
}
OPTIONAL_DEVICES = ("hyperv-testdev",)
MACHINES = ("pc", "q35")  # one machine by two names: the devices of an early PC and ACPI, no PCI
ACCELERATORS = ("tcg",)
MACHINE_PROPERTIES: dict[str, tuple[str, ...]] = {
    "kernel_irqchip": ("on", "off", "split"),  # where interrupt controllers are emulated: always here
    "pit": ("on",),
    "hpet": ("off",),
    "smm": ("off", "auto"),
    "vmport": ("off", "auto"),
    "usb": ("off",),
    "graphics": ("off", "on"),
}

# Taken without effect. Option -> the values that may be given, or ANY; None: it takes no value.
ANY: tuple[str, ...] = ()
MEANINGLESS: dict[str, tuple[str, ...] | None] = {
    "nodefaults": None,  # there are no default devices but the serial ports
    "no-user-config": None,  # no configuration files
    "display": ("none",),
    "vnc": ("none",),
    "vga": ("none",),
    "monitor": ("none", "null"),
    "parallel": ("none", "null"),
    "net": ("none",),
    "nic": ("none",),
    "no-hpet": None,  # no HPET
    "no-fd-bootchk": None,  # no BIOS
    "L": ANY,  # no BIOS files
    "trace": ANY,  # no trace points of QEMU's
    "name": ANY,  # machines are named by the laboratory
    "overcommit": ANY,  # how a host's CPUs are shared
}
HELP = ("?", "help")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options understood."""

    kernel: str
    modules: tuple[tuple[str, str], ...] = ()
    command_line: str = ""
    ram: int = DEFAULT_RAM
    processors: int = 1
    serial: tuple[SerialTarget, SerialTarget] = (SerialTarget(), SerialTarget())
    no_reboot: bool = False
    devices: tuple[str, ...] = ()
    features: Features = field(default_factory=Features)


@dataclass(frozen=True)
class Query:
    """A question instead of a machine: "version", "help", or what an option's values may be: "device", "cpu", …"""

    about: str


def parse(arguments: Sequence[str]) -> Arguments | Query:
    """What a command line asks for. Raises BadArgument, naming the option."""
    seen: dict[str, list[str]] = {}
    for option, value in _options(arguments):
        if option in QUERIES:
            return Query(QUERIES[option])
        if option in LISTS and value in HELP:
            return Query(option)
        seen.setdefault(option, []).append(value)
    for option, check in _CHECKS.items():
        for value in seen.get(option, ()):
            check(value)
    kernel = _last(seen, "kernel")
    if not kernel:
        raise BadArgument("-kernel", "is needed: there is no BIOS and no disk")
    if not Path(kernel).is_file():
        raise BadArgument("-kernel", f"could not open kernel file '{kernel}'")
    return Arguments(
        kernel=kernel,
        modules=tuple(parse_modules(_last(seen, "initrd"))),
        command_line=_last(seen, "append"),
        ram=parse_ram(_last(seen, "m")) if "m" in seen else DEFAULT_RAM,
        processors=_processors(_last(seen, "smp", "1")),
        serial=_serial(seen),
        no_reboot="no-reboot" in seen,
        devices=tuple(name for name in map(_head, seen.get("device", ())) if name in OPTIONAL_DEVICES),
        features=parse_cpu(_last(seen, "cpu", "max")),
    )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, in order."""
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-") or word == "-":
            raise BadArgument(word, "disk images are not supported; the kernel is given by -kernel")
        option = word[2:] if word.startswith("--") else word[1:]
        option = ALIASES.get(option, option)
        if option not in ARITY:
            raise BadArgument(word, "is not supported")
        if not ARITY[option]:
            yield option, ""
            continue
        value = next(rest, None)
        if value is None:
            raise BadArgument(word, "requires an argument")
        yield option, value


def _last(seen: dict[str, list[str]], option: str, default: str = "") -> str:
    return seen[option][-1] if option in seen else default


def _head(value: str) -> str:
    return value.partition(",")[0]


def _serial(seen: dict[str, list[str]]) -> tuple[SerialTarget, SerialTarget]:
    """Without -serial, COM1 is stdio only where QEMU would put it there."""
    if "serial" in seen:
        return parse_serial(seen["serial"])
    return parse_serial(["stdio" if "nographic" in seen else "null"])


def _processors(value: str) -> int:
    """vCPUs by -smp N or cpus=N; the rest speaks of a topology of that many."""
    match = re.fullmatch(r"(?:cpus=)?(\d+)((?:,(?:sockets|dies|cores|threads|maxcpus)=\d+)*)", value)
    if match is None or not int(match[1]):
        raise BadArgument(f"-smp {value}", "expected a number of vCPUs")
    return int(match[1])


def _check_property(option: str, word: str, known: dict[str, tuple[str, ...]]) -> None:
    """Raises BadArgument for a property that is not known or whose value is not one of the known."""
    name, _, value = word.partition("=")
    values = known.get(name.replace("-", "_"))
    if values is None:
        raise BadArgument(f"{option}: property '{name}'", "is not supported")
    if value.lower() not in values:
        raise BadArgument(f"{option}: property '{name}'", f"'{value}' is not supported, only {', '.join(values)}")


def _check_device(value: str) -> None:
    name, *properties = value.split(",")
    if name not in DEVICES:
        raise BadArgument(f"-device {name}", f"is not supported, only {', '.join(DEVICES)}")
    for word in properties:
        _check_property(f"-device {name}", word, DEVICES[name])
    if name == "isa-debug-exit" and not any(word.startswith("iobase=") for word in properties):
        raise BadArgument(f"-device {name}", "its port is 0xf4 here: say iobase=0xf4")


def _check_machine(value: str) -> None:
    first, *properties = value.split(",")
    name = first.removeprefix("type=")
    if "=" in name:
        properties.insert(0, name)
    elif name not in MACHINES:
        raise BadArgument(f"-machine {name}", f"is not supported, only {', '.join(MACHINES)}")
    for word in properties:
        if word.startswith("accel="):
            _check_accelerator(word.removeprefix("accel="))
        else:
            _check_property("-machine", word, MACHINE_PROPERTIES)


def _check_accelerator(value: str) -> None:
    name = _head(value)
    if not set(name.split(":")) & set(ACCELERATORS):
        raise BadArgument(f"-accel {name}", f"is not available, only {', '.join(ACCELERATORS)}")


def _check_meaningless(option: str, values: tuple[str, ...]) -> Callable[[str], None]:
    def check(value: str) -> None:
        if values and value not in values:
            raise BadArgument(f"-{option} {value}", f"is not supported, only {', '.join(values)}")

    return check


_CHECKS: dict[str, Callable[[str], None]] = {
    "device": _check_device,
    "machine": _check_machine,
    "accel": _check_accelerator,
    **{option: _check_meaningless(option, values) for option, values in MEANINGLESS.items() if values},
}
QUERIES = {"version": "version", "help": "help"}
LISTS = ("device", "machine", "accel", "cpu")
ALIASES = {"h": "help", "M": "machine"}
# Options that mean something -> whether they take a value.
MEANINGFUL = {
    "kernel": True,
    "append": True,
    "initrd": True,
    "m": True,
    "smp": True,
    "cpu": True,
    "machine": True,
    "accel": True,
    "device": True,
    "serial": True,
    "no-reboot": False,
    "nographic": False,
}
ARITY = {
    **MEANINGFUL,
    **{option: values is not None for option, values in MEANINGLESS.items()},
    **dict.fromkeys(QUERIES, False),
}
