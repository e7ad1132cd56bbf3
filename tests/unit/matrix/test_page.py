"""The page: complete in itself, and nothing that a guest said becomes markup."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

from tests.unit.matrix.made import TIMELINE, attack, transition
from vtlab_matrix.cells import Verdict
from vtlab_matrix.holes import Holes
from vtlab_matrix.page import page
from vtlab_matrix.report import Report

HOSTILE = "</script><script>alert(1)</script>&\u2028"
OUTCOMES = (
    transition(),
    attack(timeline=TIMELINE, log=f"selfguard: ready\n{HOSTILE}", rules=("cr0: pinned",)),
    attack(Verdict.SUCCEEDED, "none", broken=(attack().evidence,)),
)


def data_of(document: str) -> Any:
    packed = re.search(r'id="data">([^<]*)<', document)
    assert packed
    return json.loads(zlib.decompress(base64.b64decode(packed[1])))


def test_the_page_needs_nothing_else() -> None:
    document = page(Report(OUTCOMES, Holes(holes=())))
    assert not re.search(r"https?://|src=|@import|url\(|<link", document)
    assert "color-scheme" in document
    for mark in ("/*CSS*/", "/*JS*/", "<!--"):
        assert mark not in document


def test_each_cell_is_there_with_what_it_rests_on() -> None:
    data = data_of(page(Report(OUTCOMES, Holes.shipped())))
    blocked = data["cells"][1]
    assert [data["texts"][number] for number in blocked["e"]] == ["CR0.WP", "1", "1", "#GP(0x0) at <here>", ""]
    assert [[at, data["texts"][text], times] for at, _kind, _vtl, _vp, text, times in blocked["t"]] == [
        [line.at, line.text, line.times] for line in TIMELINE
    ]
    assert [data["texts"][number] for number in blocked["l"]][1].startswith("</script>")
    assert data["about"]["cr0-wp"][0]
    assert {cell["v"] for cell in data["cells"]} <= set(data["marks"])
    assert data["cells"][2]["b"]


def test_nothing_that_was_said_becomes_markup() -> None:
    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.count += tag == "script"

    parser = Scripts()
    parser.feed(page(Report(OUTCOMES, Holes(holes=()))))
    assert parser.count == 2


def test_a_full_grid_is_a_page_of_a_few_megabytes() -> None:
    """The full grid has some ten thousand cells: a kilobyte each, with its own numbers in its timeline."""
    cells = [
        attack(
            after=f"t{number}",
            timeline=tuple(line.model_copy(update={"at": line.at + number * 7919 % 1000}) for line in TIMELINE * 12),
            log="selfguard: ready\n" * 20 + f"oops: rip={number:#x}",
        )
        for number in range(500)
    ]
    assert len(page(Report(cells, Holes(holes=())))) < 500 << 10
