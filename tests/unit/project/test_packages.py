"""The list of packages in pyproject.toml is what the tree holds, so that a wheel lacks nothing."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = {
    "vmm": "vmm",
    "vtl0_guest": "vtl0_guest",
    "vtl1_monitor": "vtl1_monitor",
    "vtlab": "protos/vtlab",
    "vtlab_attacks": "tests/attacks",
    "vtlab_conformance": "tests/conformance",
    "vtlab_matrix": "tests/matrix",
}


def packages(name: str, folder: Path) -> set[str]:
    """Dotted names of `folder` and all folders below it that hold a Python file."""
    found = {path.parent.relative_to(folder).parts for path in folder.rglob("*.py")}
    return {".".join((name, *parts)) for parts in found}


def test_each_folder_with_code_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {name for top, folder in FOLDERS.items() for name in packages(top, ROOT / folder)}
    assert listed == present
