"""The kernel that attacks run on, and the images that it can make way for.

The prebuilt kernel trusts nobody's kernels. Here a certificate is put into it whose key exists in this process only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from vtlab.client.kexec import KernelSigner, kernel_image, policy_upgrade
from vtlab.client.symbols import Symbols

KERNELS = "vtl0_guest.kernels"  # data of the package; nothing of it is run here
BANNER = b"vulnerable driver 1.0"
FORGED_BANNER = b"vulnerable driver 6.6"
# What an operator set in place of the kernel's own policy, while its machine lives (vtlab_attacks.guest.boot).
operators_policy: ContextVar[str] = ContextVar("operators_policy", default="")
# The policy of the kernel takes none below.
VERSION = 2

# Module names, as in "kexec load NAME".
NEXT, OLD, UNSIGNED = "next", "old", "forged"


def file(name: str) -> Path:
    """A prebuilt file of the kernel."""
    return Path(str(files(KERNELS).joinpath("selfguard", name)))


@cache
def kernel_symbols() -> Symbols:
    """Of the prebuilt kernel."""
    return Symbols(file("selfguard.elf"))


@cache
def _signer() -> KernelSigner:
    return KernelSigner("kernels that selfguard may make way for")


@cache
def kernel() -> bytes:
    """The prebuilt kernel, which trusts the signer."""
    return _signer().trusted_by(file("selfguard.elf").read_bytes())


def marked(image: bytes) -> bytes:
    """The same with another banner: an attacker's, or one with a known hole."""
    return image.replace(BANNER, FORGED_BANNER)


@cache
def images(line: str) -> tuple[tuple[bytes, str], ...]:
    """Signed and new; signed, but old; new, but signed by nobody. All are told `line`."""
    signer = _signer()
    return (
        (signer.sign(kernel_image(kernel(), VERSION, line)), NEXT),
        (signer.sign(kernel_image(marked(kernel()), VERSION - 1, line)), OLD),
        (kernel_image(marked(kernel()), VERSION, line), UNSIGNED),
    )


def policy(version: int, change: Mapping[str, Any] = MappingProxyType({}), *, signed: bool = True) -> bytes:
    """The policy that the machine's guest is under, with some keys in it changed, as UPGRADE takes it.

    Args:
        change: keys within keys; what it does not name stays.
    """
    text = operators_policy.get() or kernel_symbols().sections[".vtlab.policy"].data.rstrip(b"\0").decode()
    data = policy_upgrade(_changed(text, json.dumps(dict(change))) if change else text, version)
    return _signer().sign(data) if signed else data


@cache
def _changed(text: str, change: str) -> str:
    whole: dict[str, Any] = yaml.safe_load(text)
    _merge(whole, json.loads(change))
    return yaml.safe_dump(whole, sort_keys=False)


def _merge(whole: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, Mapping):
            _merge(whole.setdefault(key, {}), value)
        else:
            whole[key] = value
