"""What came of the rows, for people, for scripts and for CI: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.status import HvStatus
from vtlab_conformance.runner import Result
from vtlab_conformance.unreachable import UNREACHABLE


@dataclass(frozen=True)
class Profile:
    """All results of one profile, and the seconds that they took."""

    name: str
    results: Sequence[Result]
    seconds: float

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if not result.ok]

    def reached(self) -> set[tuple[int, int]]:
        """Pairs of hypercall and status that rows showed."""
        return {pair for result in self.results if result.ok for pair in result.row.pairs()}

    def sections(self) -> list[tuple[str, int, int]]:
        """Section, rows, and how many of them failed; in the order of the facts."""
        rows = Counter(result.row.section for result in self.results)
        failed = Counter(result.row.section for result in self.failed)
        return [(section, rows[section], failed[section]) for section in sorted(rows)]

    def summary(self) -> str:
        """The last line of a profile."""
        unreachable = sum(self.name in item.profiles for item in UNREACHABLE)
        done, failed = len(self.results), len(self.failed)
        return (
            f"conformance: {self.name}: rows {done}, ok {done - failed}, failed {failed}; "
            f"pairs of hypercall and status: reached {len(self.reached())}, unreachable {unreachable}; "
            f"{self.seconds:.1f} s"
        )


def call_name(code: int) -> str:
    """As the TLFS writes it."""
    if code not in set(HypercallCode):
        return f"call {code:#x}"
    return f"HvCall{HypercallCode(code).name.title().replace('_', '')}"


def as_json(profile: Profile) -> list[dict[str, Any]]:
    """One value a row, then the summary."""
    rows: list[dict[str, Any]] = [
        {
            "profile": result.profile,
            "scenario": result.scenario,
            "row": result.row.name,
            "section": result.row.section,
            "rule": result.row.rule,
            "source": result.row.source,
            "ok": result.ok,
            "detail": result.detail,
            "pairs": sorted([call_name(code), HvStatus(status).name] for code, status in result.row.pairs()),
        }
        for result in profile.results
    ]
    summary: dict[str, Any] = {
        "profile": profile.name,
        "rows": len(profile.results),
        "failed": len(profile.failed),
        "pairs_reached": sorted([call_name(code), HvStatus(status).name] for code, status in profile.reached()),
        "pairs_unreachable": [
            [call_name(item.code), item.status.name, item.reason]
            for item in UNREACHABLE
            if profile.name in item.profiles
        ],
        "seconds": round(profile.seconds, 3),
    }
    return [*rows, summary]


def junit(profiles: Iterable[Profile]) -> bytes:
    """JUnit's XML: a suite for each profile, a case for each row."""
    root = ElementTree.Element("testsuites", name="vtlab conformance")
    for profile in profiles:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=profile.name,
            tests=str(len(profile.results)),
            failures=str(len(profile.failed)),
            time=f"{profile.seconds:.3f}",
        )
        for result in profile.results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{profile.name}.{result.scenario}", name=result.row.name
            )
            if not result.ok:
                failure = ElementTree.SubElement(case, "failure", message=result.detail)
                failure.text = f"{result.row.rule} ({result.row.source})"
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written + b"\n"
