"""The documents name files, folders, commands and make targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TOPS = ("protos", "vmm", "vtl0_guest", "vtl1_monitor", "tests", "deploy", "docs")

# `vmm/run_loop.py`, `docs/`, `vtl0_guest/cpu/*.py`; not addresses, options or Python names.
_PATH = re.compile(rf"`((?:{'|'.join(TOPS)})/[\w./*-]*)`")
_TARGET = re.compile(r"`make ([a-z-]+)")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_paths_exist(document: Path) -> None:
    named = _PATH.findall(document.read_text())
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    links = _LINK.findall(document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(_TARGET.findall(document.read_text())) <= targets
