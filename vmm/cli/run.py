"""`vtlab run`: boots an image as QEMU would, with the guest's serial port on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.boot import Boot, boot
from vmm.cli.qemu_options import parse_design_options, parse_flat, parse_modules, parse_ram, parse_serial
from vtlab.errors import BadArgument

DETERMINISTIC, DEFAULT_SEED = "--deterministic", 0


def with_seed(arguments: Sequence[str]) -> list[str]:
    """Arguments of `run` with the default seed behind a --deterministic that no number follows."""
    complete: list[str] = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        complete.append(argument)
        if argument == DETERMINISTIC and not after.lstrip("-").isdecimal():
            complete.append(str(DEFAULT_SEED))
    return complete


def run(
    image: Annotated[str, typer.Argument(help="Linux kernel, multiboot, ELF or flat image.")] = "",
    kernel: Annotated[str, typer.Option("-kernel", metavar="IMAGE", help="The same as the argument.")] = "",
    ram: Annotated[str, typer.Option("-m", metavar="SIZE", help="RAM, in MiB or with a unit.")] = "64M",
    processors: Annotated[int, typer.Option("-smp", metavar="N", min=1, help="vCPUs.")] = 1,
    append: Annotated[str, typer.Option("-append", metavar="TEXT", help="Kernel command line.")] = "",
    initrd: Annotated[
        str, typer.Option("-initrd", metavar="FILE[ ARGS][,…]", help="Initial RAM disk, or multiboot modules.")
    ] = "",
    serial: Annotated[
        list[str] | None,
        typer.Option("-serial", metavar="TARGET", help="stdio, file:PATH or null; twice for COM2."),
    ] = None,
    no_reboot: Annotated[bool, typer.Option("-no-reboot", help="Stop where the machine would reset.")] = False,
    flat: Annotated[
        str,
        typer.Option(
            "--flat", metavar="ADDRESS[,MODE]", help="The image is raw bytes for there; MODE real, protected, long."
        ),
    ] = "",
    device: Annotated[
        list[str] | None,
        typer.Option("-device", metavar="NAME", help="An optional device: hyperv-testdev."),
    ] = None,
    no_vtl1: Annotated[bool, typer.Option("--no-vtl1", help="Do not offer VTL1 to the guest.")] = False,
    guest_vtl1: Annotated[
        bool, typer.Option("--guest-vtl1", help="VTL1 is code that the guest supplies, not a policy.")
    ] = False,
    vsm_profile: Annotated[
        str, typer.Option("--vsm-profile", metavar="NAME", help="How VSM answers: openvmm (default), tlfs or kvm.")
    ] = "",
    design: options.Design = "vtl",
    design_option: Annotated[
        list[str] | None, typer.Option("--design-option", metavar="NAME=VALUE", help="A switch of the design.")
    ] = None,
    policy: Annotated[str, typer.Option("--policy", metavar="FILE", help="Policy that overrides the guest's.")] = "",
    guard_on: Annotated[
        str, typer.Option("-guard-on", metavar="TEXT", help="Guard it with --policy when COM1 has said this.")
    ] = "",
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Stop it then.", min=0)] = 0,
    deterministic: Annotated[
        int | None,
        typer.Option(
            DETERMINISTIC,
            metavar="[SEED]",
            min=0,
            max=(1 << 64) - 1,
            help=f"A run that repeats exactly; the seed is {DEFAULT_SEED} if no number follows.",
        ),
    ] = None,
    exit_log: Annotated[
        str, typer.Option("--exit-log", metavar="FILE", help="A line for each exit, to compare runs with diff.")
    ] = "",
    rules: options.Rules = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Boot an image and wait for its end; Ctrl-C stops it. Returns (value << 1) | 1 of the guest's debug exit."""
    if bool(image) == bool(kernel):
        raise BadArgument("image", "give one, as an argument or by -kernel")
    if guard_on and not policy:
        raise BadArgument("-guard-on", "needs --policy: what shall hold")
    what = Boot(
        image=image or kernel,
        ram=parse_ram(ram),
        processors=processors,
        command_line=append,
        modules=tuple(parse_modules(initrd)),
        serial=parse_serial(serial or []),
        no_reboot=no_reboot,
        start=parse_flat(flat),
        devices=tuple(device or ()),
        vtl1=not no_vtl1 and design == "vtl",
        guest_vtl1=guest_vtl1,
        vsm_profile=vsm_profile,
        design=design,
        design_options=parse_design_options(design_option or []),
        policy=read_text(policy),
        policy_name=policy,
        guard_on=guard_on,
        timeout=timeout,
        deterministic=deterministic,
        exit_log=exit_log,
        as_json=as_json,
    )
    return boot(what, laboratory.given_or_private(vmm, monitor, trust, rules, as_json))


def read_text(file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadArgument(file, f"is not UTF-8 text: {error}") from None
