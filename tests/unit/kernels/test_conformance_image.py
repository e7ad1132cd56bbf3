"""The prebuilt conformance guest is what its sources say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vtl0_guest.kernels.conformance import build
from vtl0_guest.kernels.selfguard.build import check, toolchain

PREBUILT = build.SOURCE / "conformance.elf"


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="no gcc and ld to rebuild it with")
def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    build.build(tmp_path)
    committed = (build.SOURCE / "toolchain.txt").read_text()
    if toolchain() != committed:
        pytest.skip(f"the prebuilt file is from another toolchain: {committed!r}")
    assert (tmp_path / "conformance.elf").read_bytes() == PREBUILT.read_bytes()


def test_the_file_is_the_memory_image() -> None:
    check(PREBUILT)
