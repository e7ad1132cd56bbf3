"""The run as JUnit XML, for CI: a suite a design, a case a cell; what fails the run is a failure."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from vtlab_matrix.cells import BOOT
from vtlab_matrix.report import Report

_FORBIDDEN = {code: "\N{REPLACEMENT CHARACTER}" for code in range(32) if chr(code) not in "\t\n\r"}


def junit(report: Report) -> str:
    """The document."""
    failing = {one.cell for one in report.unexplained}
    root = ET.Element("testsuites", name="vtlab matrix", time=f"{report.seconds:.3f}")
    for design in report.designs:
        cells = [one for one in report.outcomes if one.cell.design == design]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=design,
            tests=str(len(cells)),
            failures=str(sum(one.cell in failing for one in cells)),
            time=f"{sum(one.seconds for one in cells):.3f}",
        )
        for one in cells:
            place = f"{design}.{one.cell.after or BOOT}" if one.cell.kind == "attack" else f"{design}.transitions"
            case = ET.SubElement(suite, "testcase", classname=place, name=one.cell.name, time=f"{one.seconds:.3f}")
            told = f"{one.verdict}: {one.evidence}".translate(_FORBIDDEN)
            if one.cell in failing:
                broken = "\n".join(str(broken) for broken in one.broken)
                ET.SubElement(case, "failure", message=told, type=one.verdict.value).text = broken.translate(_FORBIDDEN)
            else:
                hole = report.explanations.get(one.cell)
                ET.SubElement(case, "system-out").text = told + (f" [{hole.id}: {hole.text}]" if hole else "")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
