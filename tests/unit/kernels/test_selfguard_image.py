"""The prebuilt kernel is what its sources say, and what its loaders and its policy count on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from vtl0_guest.kernels import selfguard_image, signed_module, unsigned_module
from vtl0_guest.kernels.selfguard import build
from vtl1_monitor.policy import schema
from vtlab.services import MODULE_SIGNATURE, MODULE_SIGNATURE_MAGIC, PKEY_ID_PKCS7, Service

BUILT = ["selfguard.elf", "module.elf", "module.signed.elf"]


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="no gcc and ld to rebuild it with")
def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    build.build(tmp_path)
    committed = (build.SOURCE / "toolchain.txt").read_text()
    if build.toolchain() != committed:
        pytest.skip(f"the prebuilt files are from another toolchain: {committed!r}")
    for name in BUILT:
        assert (tmp_path / name).read_bytes() == (build.SOURCE / name).read_bytes(), name


def section_bytes(name: str) -> bytes:
    with selfguard_image().open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(name)
        assert section is not None, name
        return bytes(section.data())


def test_the_file_is_the_memory_image() -> None:
    build.check(selfguard_image())


def test_every_section_that_the_policy_names_owns_whole_pages() -> None:
    import yaml

    policy = schema.Policy.model_validate(yaml.safe_load((build.SOURCE / "policy.yaml").read_text()))
    with selfguard_image().open("rb") as stream:
        elf = ELFFile(stream)
        for rule in policy.memory:
            if rule.section is None:
                continue
            section = elf.get_section_by_name(rule.section)
            assert section is not None, rule.section
            assert (section["sh_addr"] % 4096, section["sh_size"] % 4096) == (0, 0), rule.section


def test_the_policy_travels_in_the_image() -> None:
    assert section_bytes(".vtlab.policy").rstrip(b"\0") == (build.SOURCE / "policy.yaml").read_bytes()


def test_only_the_privileged_section_writes_control_registers_from_rdi() -> None:
    # mov %rdi,%cr0/3/4, as privileged.S assembles them. The gadgets use RAX.
    for writer in (b"\x0f\x22\xc7", b"\x0f\x22\xdf", b"\x0f\x22\xe7"):
        assert writer in section_bytes(".text.privileged")
        assert writer not in section_bytes(".text")


def test_service_numbers_agree_with_the_kernel() -> None:
    for line in (build.SOURCE / "services.h").read_text().splitlines():
        if line.startswith("#define SERVICE_"):
            _, name, number = line.split()
            assert Service[name.removeprefix("SERVICE_")] == int(number, 16)


def test_the_signed_module_is_the_module_with_a_signature() -> None:
    signed, module = signed_module().read_bytes(), unsigned_module().read_bytes()
    assert signed.startswith(module)
    assert signed.endswith(MODULE_SIGNATURE_MAGIC)
    trailer = MODULE_SIGNATURE.unpack_from(signed, len(signed) - len(MODULE_SIGNATURE_MAGIC) - MODULE_SIGNATURE.size)
    assert trailer[2] == PKEY_ID_PKCS7
    assert trailer[-1] == len(signed) - len(module) - MODULE_SIGNATURE.size - len(MODULE_SIGNATURE_MAGIC)
