"""`vtlab policy`: check a file, and see, override or lock what is in force."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.exit_codes import ExitCode
from vmm.cli.output import as_dict, print_json, print_table
from vmm.cli.run import read_text

if TYPE_CHECKING:
    from vtlab.v1 import monitor_pb2

app = typer.Typer(help="The policy of VTL1: check, get, set, lock.", no_args_is_help=True)
_File = Annotated[str, typer.Argument(metavar="FILE", help="Policy in YAML.")]


@app.command()
def check(
    file: _File,
    image: Annotated[str, typer.Option("--image", metavar="FILE", help="Resolve its sections and symbols here.")] = "",
    vm: Annotated[str, typer.Option("--vm", metavar="NAME", help="… or in the image of this machine.")] = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Say all that is wrong with a policy file; exit code 1 if anything is."""
    text = read_text(file)
    with laboratory.given_or_private(vmm, monitor, trust, as_json=as_json) as lab:
        if image:
            with lab.create(image) as machine:
                answer = lab.policy.check(text, machine, file)
        else:
            answer = lab.policy.check(text, vm, file)
    if as_json:
        print_json(as_dict(answer))
    for problem in answer.problems if not as_json else ():
        place = f"{file}:{problem.line}" if problem.line else file
        sys.stderr.write(f"{place}: {problem.key + ': ' if problem.key else ''}{problem.message}\n")
    if not as_json and not answer.problems:
        sys.stdout.write("".join(f"{rule}\n" for rule in answer.rules) or f"{file}: no problem found\n")
    return ExitCode.NEGATIVE if answer.problems else ExitCode.OK


@app.command()
def get(
    vm: options.Vm = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Print the policy in force, its rules and what was measured."""
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        _show(lab.policy.get(machine), as_json)


@app.command("set")
def set_policy(
    file: _File,
    vm: options.Vm = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Override the guest's own policy, for experiments; refused once locked."""
    text = read_text(file)
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        _show(lab.policy.set(machine, text, file), as_json)


@app.command()
def lock(
    vm: options.Vm = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Make the policy final until the machine is reset."""
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        _show(lab.policy.lock(machine), as_json)


def guard(
    file: Annotated[str, typer.Option("--policy", metavar="FILE", help="Policy in YAML.")],
    vm: Annotated[str, typer.Argument(metavar="[MACHINE]", help="Not needed if there is only one.")] = "",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> None:
    """Guard a running machine from outside: the policy holds at once, whatever its guest knows of VTL1."""
    text = read_text(file)
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        lab.policy.set(machine, text, file)
        machine.guard()
        _show(lab.policy.get(machine), as_json)


def _show(policy: monitor_pb2.PolicyStatus, as_json: bool) -> None:
    if as_json:
        print_json(as_dict(policy))
        return
    from vtlab.v1 import monitor_pb2

    source = monitor_pb2.PolicySource.Name(policy.source).removeprefix("POLICY_SOURCE_").lower()
    state = "locked" if policy.locked else "open"
    sys.stdout.write(f"policy: {source}, {state}, sha256 {policy.sha256.hex()}\n")
    sys.stdout.write("".join(f"{rule}\n" for rule in policy.rules))
    if policy.measurements:
        rows = [
            [one.name, f"{one.gpa:#x}", f"{one.size:#x}", one.sha256.hex(), "yes" if one.matches_image else "NO"]
            for one in policy.measurements
        ]
        print_table("measured", ["name", "GPA", "size", "SHA-256", "as in the image"], rows)
