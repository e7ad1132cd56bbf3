"""`vtlab chaos` in short, and what it finds in a VMM that has a defect."""

from __future__ import annotations

import re

import pytest

from tests.integration.chaos import defects
from vmm import launcher
from vmm.chaos.observer import Findings
from vmm.chaos.run import Chaos, Report, run
from vmm.cli.main import main
from vtlab.trust.roles import Role


def quietly(_number: int, _name: str, _report: Report) -> None:
    """Nobody reads it."""


@pytest.mark.timeout(300)
def test_nothing_is_lost_doubled_or_open(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["chaos", "--kills", "8", "--seed", "7"])
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"chaos: faults 8, guest kills (\d+), resets (\d+), lost 0, doubled 0, windows 0, recovery p95 [\d.]+ s", last
    )
    assert found, last
    assert code == 0
    assert int(found[2]) <= int(found[1])


def defective(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    monkeypatch.setenv(defects.VARIABLE, defect)
    monkeypatch.setattr(launcher, "SERVERS", launcher.SERVERS | {Role.VMM: defects.__name__})


@pytest.mark.timeout(300)
def test_a_journal_that_is_written_after_the_reply_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    defective(monkeypatch, "journal after reply")
    monkeypatch.setattr(Chaos, "_one", lambda _self, *roles: roles[0])
    monkeypatch.setattr("vmm.chaos.observer.PATIENCE", 20.0)
    report = _killing_the_vmm(monkeypatch, 12)
    assert report.findings.lost + report.findings.doubled + len(report.findings.resets) > 0, report.findings
    assert not report.good


@pytest.mark.timeout(300)
def test_a_protection_that_comes_after_the_resume_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    defective(monkeypatch, "protection after resume")
    report = _killing_the_vmm(monkeypatch, 1)
    assert report.findings.windows > 0, report.findings
    assert not report.good


def _killing_the_vmm(monkeypatch: pytest.MonkeyPatch, faults: int) -> Report:
    def kill(self: Chaos) -> str:
        self.report.faults += 1
        self._observer.wait_progress(9)  # lines of the log, which are events
        self.kill(Role.VMM)
        self._observer.check()
        return "kill vmm"

    monkeypatch.setattr(Chaos, "fault", kill)
    return run(faults, 1, told=quietly)


def test_what_the_last_line_says() -> None:
    report = Report(Findings(resets=["why"]), faults=40, guest_kills=1, recoveries=[0.1 * n for n in range(1, 21)])
    assert report.line() == (
        "chaos: faults 40, guest kills 1, resets 1, lost 0, doubled 0, windows 0, recovery p95 1.90 s"
    )
    assert report.good


@pytest.mark.parametrize(("kind", "kills"), [("lost", 1), ("doubled", 1), ("windows", 1), (None, 0)])
def test_what_makes_it_fail(kind: str | None, kills: int) -> None:
    report = Report(Findings(resets=["why"]), guest_kills=kills)
    if kind:
        report.findings.find(kind, "for a reason", 2)
        assert f"{kind} 2" in report.line()
    assert not report.good
