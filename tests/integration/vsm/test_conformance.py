"""Every row of the conformance suite on a machine of ours, for each profile; and rows that must fail do."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.cli.main import main
from vtlab.client import Lab
from vtlab.hyperv.profiles import PROFILES
from vtlab_conformance.runner import run_scenario
from vtlab_conformance.scenarios import SCENARIOS, Scenario
from vtlab_conformance.steps import broken

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: str(scenario.name))
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_row_comes_out_as_it_must(lab: Lab, profile: str, scenario: Scenario) -> None:
    results = run_scenario(lab, profile, scenario)
    assert [f"{result.row.name}: {result.detail}" for result in results if not result.ok] == []


def test_a_wrong_expectation_fails(lab: Lab) -> None:
    scenario = BY_NAME["vtl1"]
    first, *others = scenario.rows("openvmm")[:6]
    results = run_scenario(lab, "openvmm", scenario, [broken(first), *others])
    assert [result.ok for result in results] == [False] + [True] * 5
    assert "result want 0x1 got 0x0" in results[0].detail


def test_the_rows_of_one_profile_fail_on_another(lab: Lab) -> None:
    scenario = BY_NAME["vtl0"]
    results = run_scenario(lab, "openvmm", scenario, scenario.rows("tlfs"))
    failed = {result.row.name for result in results if not result.ok}
    assert {"2.reserved.27", "3.enable.again", "3.get.partition", "3.translate.own"} <= failed


def test_the_command_writes_images_and_judges_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--profile", "kvm", "--image-only", str(tmp_path)]) == 0
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == sorted(f"kvm-{scenario.name}.multiboot" for scenario in SCENARIOS)
    names = [row.name for scenario in SCENARIOS for row in scenario.rows("kvm")]
    log, junit = tmp_path / "com1.log", tmp_path / "junit.xml"
    log.write_text("".join(f"ROW {name} ok\n" for name in names))
    assert main(["conformance", "--profile", "kvm", "--judge", str(log), "--junit", str(junit)]) == 0
    assert junit.read_bytes().startswith(b"<?xml")
    log.write_text("".join(f"ROW {name} ok\n" for name in names[1:]))
    capsys.readouterr()
    assert main(["conformance", "--profile", "kvm", "--judge", str(log)]) == 1
    assert f"FAIL kvm {names[0]}" in capsys.readouterr().out


def test_an_unknown_profile_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--profile", "xen"]) == 4
    assert "'xen'" in capsys.readouterr().err
