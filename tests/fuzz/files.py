"""What comes as a file or a piece of guest memory: boot images, policies, signed modules and their certificates."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.target import Defect, Target, corpus, mutated
from tests.unit.loaders.images import RAM_SIZE, Memory, Segment, elf_image, multiboot_header
from tests.unit.loaders.test_bzimage import kernel
from tests.unit.monitor import keys
from vtl0_guest.kernels import selfguard_image
from vtl0_guest.loaders import load
from vtl1_monitor import cms, module_file
from vtl1_monitor.policy.image import BootImage
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.text import parse
from vtlab.errors import BadImage
from vtlab.services import ModuleType
from vtlab.v1 import vcpu_pb2

_POLICIES = Path(__file__).parents[2] / "deploy" / "policies"
_FORMATS = [
    vcpu_pb2.IMAGE_FORMAT_DETECT,
    vcpu_pb2.IMAGE_FORMAT_DETECT,
    vcpu_pb2.IMAGE_FORMAT_ELF,
    vcpu_pb2.IMAGE_FORMAT_MULTIBOOT,
    vcpu_pb2.IMAGE_FORMAT_BZIMAGE,
    vcpu_pb2.IMAGE_FORMAT_FLAT,
]


def _images() -> list[bytes]:
    segment = Segment(0x100000, 0x100000, b"\xf4" * 64, 4096)
    flags = multiboot_header(0x10003, (0x100000, 0x100000, 0, 0, 0x100000))
    seeds = [elf_image([segment], 0x100000, bits=bits) for bits in (32, 64)]
    seeds += [elf_image([segment, segment._replace(physical=0x200000)], 0x100000, prefix=multiboot_header())]
    return [*seeds, flags + b"\xf4" * 256, kernel(), *corpus("images")]


class LoaderTarget(Target):
    """The loaders of VTL0, and the reader of boot images in VTL1: nothing but BadImage, nothing written beyond RAM."""

    def __init__(self) -> None:
        self._seeds = _images()
        self._memory = Memory()

    def step(self, rng: random.Random) -> str:
        image = mutated(rng, self._seeds)
        boot = vcpu_pb2.BootImage(
            path="image", format=rng.choice(_FORMATS), command_line="a" * rng.choice((0, 8, 4096))
        )
        boot.entry, boot.load_address = rng.choice((0, 0x7C00)), rng.choice((0, 0x7C00, RAM_SIZE, (1 << 64) - 1))
        boot.start_mode = rng.choice((0, 1, 2, 3, 99))  # type: ignore[assignment]
        modules = [rng.randbytes(rng.randrange(64)) for _ in range(rng.choice((0, 0, 1, 2)))]
        boot.modules.extend(vcpu_pb2.BootModule(path=f"module {number}") for number in range(len(modules)))
        outcomes = [self._seen_by_vtl1(image)]
        try:
            load(image, boot, modules, self._memory.write, RAM_SIZE, rng.choice((1, 4)))
            outcomes.append("loaded")
        except BadImage:
            outcomes.append("refused")
        return ", ".join(outcomes)

    @staticmethod
    def _seen_by_vtl1(image: bytes) -> str:
        try:
            seen = BootImage(image)
        except BadImage:
            return "unreadable"
        seen.expected(0x100000, 4096)
        return "read"


class PolicyTarget(Target):
    """A policy's text, and what it means against a real kernel: its problems have lines, and nothing else comes out."""

    def __init__(self) -> None:
        self._image = BootImage(selfguard_image().read_bytes(), "kernel")
        self._seeds = [path.read_bytes() for path in sorted(_POLICIES.iterdir())] + corpus("policies")

    def step(self, rng: random.Random) -> str:
        text = mutated(rng, self._seeds, 64 << 10)
        try:
            policy = parse(text, "fuzz")
        except PolicyProblems as error:
            return _explained(error, "unreadable")
        try:
            resolve(policy, self._image, 64 << 20, None)
        except PolicyProblems as error:
            return _explained(error, "unresolved")
        return "a policy"


def _explained(error: PolicyProblems, outcome: str) -> str:
    if not all(problem.message for problem in error.problems):
        raise Defect(f"a problem without a message: {error.problems}")
    return outcome


class ModuleTarget(Target):
    """Signed module files, signatures and certificates, as a hostile VTL0 hands them over."""

    def __init__(self) -> None:
        body = corpus("modules")[0]
        self._certificate = keys.signer("fuzz")[1]
        signed = [keys.appended(body, keys.cms(body, "fuzz", bits)) for bits in (2048, 0)]
        self._body = body
        self._modules = [*signed, body]
        self._signatures = [module_file.split(one).signature for one in signed]
        self._certificates = [keys.der("fuzz"), keys.der("fuzz") + keys.der("other", 0) + bytes(16)]
        self._forms: tuple[Callable[[random.Random], str], ...] = (self._split, self._signature, self._keys, self._elf)

    def step(self, rng: random.Random) -> str:
        return rng.choice(self._forms)(rng)

    def _split(self, rng: random.Random) -> str:
        try:
            parts = module_file.split(mutated(rng, self._modules))
            signer = cms.verify(parts.signature, parts.module, [self._certificate])
        except (module_file.BadModule, cms.BadSignature):
            return "module refused"
        if signer != self._certificate or parts.module != self._body:
            raise Defect("a changed module passes for a signed one")
        return "module as it was signed"

    def _signature(self, rng: random.Random) -> str:
        data = self._body if rng.random() < 0.7 else self._body[:-1]
        try:
            cms.verify(mutated(rng, self._signatures), data, [self._certificate])
        except cms.BadSignature:
            return "signature refused"
        if data is not self._body:
            raise Defect("a signature holds for other data")
        return "signature of the same data"

    def _keys(self, rng: random.Random) -> str:
        try:
            cms.load_certificates(mutated(rng, self._certificates))
        except ValueError:
            return "certificates refused"
        return "certificates"

    def _elf(self, rng: random.Random) -> str:
        addresses = dict.fromkeys(ModuleType, 0x1000)
        try:
            module_file.expected_sections(mutated(rng, [self._body]), addresses, lambda _name: 0x2000)
        except module_file.BadModule:
            return "relocation refused"
        return "relocated"
