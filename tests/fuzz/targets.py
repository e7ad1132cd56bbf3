"""The targets by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.certificates import CertificateTarget
from tests.fuzz.enters import EnterTarget
from tests.fuzz.exits import ExitTarget
from tests.fuzz.files import LoaderTarget, ModuleTarget, PolicyTarget
from tests.fuzz.hypercalls import HypercallTarget
from tests.fuzz.messages import MessageTarget
from tests.fuzz.stores import JournalTarget, SealedTarget
from tests.fuzz.target import Target

TARGETS: dict[str, Callable[[], Target]] = {
    "certificates": CertificateTarget,
    "enters": EnterTarget,
    "exits": ExitTarget,
    "hypercalls": HypercallTarget,
    "journal": JournalTarget,
    "loaders": LoaderTarget,
    "messages": MessageTarget,
    "modules": ModuleTarget,
    "policies": PolicyTarget,
    "sealed": SealedTarget,
}
