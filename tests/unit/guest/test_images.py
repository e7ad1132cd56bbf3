"""Files of a boot image are read below the machine's folder only, and only if they are the ones that were named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vtl0_guest.images import read_file
from vtlab.errors import BadImage


def test_reads_what_was_hashed(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"code")
    assert read_file(tmp_path, "kernel", hashlib.sha256(b"code").digest()) == b"code"


@pytest.mark.parametrize(
    ("name", "sha256", "detail"),
    [
        ("kernel", hashlib.sha256(b"other").digest(), "sha256"),
        ("kernel", b"", "sha256"),
        ("absent", b"", "cannot be read"),
        (".", b"", "cannot be read"),
        ("../secret", hashlib.sha256(b"s").digest(), "outside"),
        ("link", hashlib.sha256(b"s").digest(), "outside"),
        ("/etc/passwd", b"", "outside"),
    ],
)
def test_refuses_by_name(tmp_path: Path, name: str, sha256: bytes, detail: str) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "kernel").write_bytes(b"code")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BadImage) as error:
        read_file(folder, name, sha256)
    assert error.value.subject == name
    assert detail in error.value.detail
