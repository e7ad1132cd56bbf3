"""The made-up kernel in a machine that VTL1 guards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.unit.monitor.kernel_image import KernelImage, kernel
from tests.unit.monitor.vtl0 import Vtl0

# Other tests and other processes share the machine: how long one example takes says nothing.
settings.register_profile("monitor", deadline=None)
settings.load_profile("monitor")

POLICY = """\
version: 1
name: test
registers:
  cr0: {must_be_1: [PE, PG, WP]}
  cr4: {must_be_1: [SMEP, SMAP, UMIP], must_be_0: [VMXE], watched: [PCE]}
  efer: {must_be_1: [NXE, LME]}
  cr3: page_tables
  gdtr: frozen
  idtr: frozen
  ldtr: frozen
  tr: frozen
msrs:
  LSTAR: frozen
  SYSENTER_EIP: frozen
  PAT: {value: 0x0007040600070406}
  "0xC0000102": watched
memory:
  - {name: text, section: .text, access: r-x}
  - {name: cr writers, section: .text.privileged, access: ---, when: end_of_boot}
  - {name: rodata, section: .rodata, access: r--}
  - {name: patches, section: .patches, access: r--}
  - {name: certificates, section: .certificates, access: r--}
  - {name: hypercall page, symbol: hypercall_page, access: r-x, measure: false}
  - {name: vtl1, symbol: vtl1_memory, access: ---, private: true}
  - {name: everything else, default: true, access: rw-, execute: user}
page_tables: {guard: true}
violation: {default: gp, rodata: halt}
"""


@pytest.fixture
def policy() -> str:
    """The text that the guest hands over."""
    return POLICY


@pytest.fixture
def certificates() -> bytes:
    """Content of the section .certificates."""
    return b""


@pytest.fixture
def kernel_file(certificates: bytes) -> KernelImage:
    """What was booted."""
    return kernel(certificates=certificates)


@pytest.fixture
def rules_in_code() -> tuple[object, ...]:
    """Rules shipped with the monitor."""
    return ()


@pytest.fixture
def vtl0(tmp_path: Path, kernel_file: KernelImage, rules_in_code: tuple[object, ...]) -> Iterator[Vtl0]:
    """A machine before its kernel deprivileges itself."""
    machine = Vtl0(tmp_path, kernel_file, rules_in_code)
    yield machine
    machine.close()


@pytest.fixture
def locked(vtl0: Vtl0, policy: str) -> Vtl0:
    """The same after the end of boot."""
    vtl0.lock(policy)
    return vtl0
