"""`vtlab conformance`: the VSM conformance suite on machines of a laboratory, or as images for other hypervisors."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.exit_codes import ExitCode
from vmm.cli.output import print_json, print_table, progress
from vtlab.errors import BadArgument
from vtlab.hyperv.profiles import DEFAULT_PROFILE, PROFILES

if TYPE_CHECKING:
    from vtlab_conformance.report import Profile


def conformance(
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help=f"One of {', '.join(PROFILES)}; without it all of them.")
    ] = "",
    junit: Annotated[str, typer.Option("--junit", metavar="FILE", help="Also write JUnit's XML.")] = "",
    image_only: Annotated[
        str,
        typer.Option(
            "--image-only", metavar="FOLDER", help="Run nothing: write the guests, one multiboot file a boot."
        ),
    ] = "",
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="LOG", help="Run nothing: judge what the guests said on COM1 elsewhere."),
    ] = None,
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Run the rules of VSM as rows of guest code, for each profile; exit code 0 if every row came out as it must."""
    if profile and profile not in PROFILES:
        raise BadArgument(f"profile {profile!r}", f"is none of {', '.join(PROFILES)}")
    if image_only:
        return _write_images(Path(image_only), profile or DEFAULT_PROFILE.name)
    if judge:
        done = [_judge(judge, profile or DEFAULT_PROFILE.name)]
    else:
        done = _run([profile] if profile else list(PROFILES), (vmm, monitor, trust), as_json)
    if junit:
        from vtlab_conformance.report import junit as as_junit

        Path(junit).write_bytes(as_junit(done))
    for one in done:
        _tell(one, as_json)
    return ExitCode.OK if not any(one.failed for one in done) else ExitCode.NEGATIVE


def _run(profiles: list[str], where: tuple[str, str, str], as_json: bool) -> list[Profile]:
    from vtlab_conformance.report import Profile
    from vtlab_conformance.runner import run_scenario
    from vtlab_conformance.scenarios import SCENARIOS

    done = []
    with laboratory.given_or_private(*where, as_json=as_json) as lab:
        for name in profiles:
            started = time.monotonic()
            with progress(f"running the rows of {name}", as_json):
                results = [result for scenario in SCENARIOS for result in run_scenario(lab, name, scenario)]
            done.append(Profile(name, results, time.monotonic() - started))
    return done


def _judge(logs: list[str], name: str) -> Profile:
    from vtlab_conformance.report import Profile
    from vtlab_conformance.runner import judge
    from vtlab_conformance.scenarios import SCENARIOS

    output = "\n".join(Path(log).read_text(errors="replace") for log in logs)
    results = [
        result
        for scenario in SCENARIOS
        for result in judge(name, scenario.name, scenario.rows(name), output, "it is not in the log")
    ]
    return Profile(name, results, 0.0)


def _write_images(folder: Path, name: str) -> int:
    from vtlab_conformance.image import image
    from vtlab_conformance.scenarios import SCENARIOS

    folder.mkdir(parents=True, exist_ok=True)
    for scenario in SCENARIOS:
        file = folder / f"{name}-{scenario.name}.multiboot"
        file.write_bytes(image(scenario.rows(name)))
        sys.stdout.write(f"{file}\n")
    return ExitCode.OK


def _tell(profile: Profile, as_json: bool) -> None:
    if as_json:
        from vtlab_conformance.report import as_json as as_values

        for value in as_values(profile):
            print_json(value)
        return
    rows = [[section, str(count), str(failed)] for section, count, failed in profile.sections()]
    print_table(f"profile {profile.name}", ["section", "rows", "failed"], rows)
    for result in profile.failed:
        sys.stdout.write(f"FAIL {result.profile} {result.row.name}: {result.row.rule}: {result.detail}\n")
    sys.stdout.write(profile.summary() + "\n")
