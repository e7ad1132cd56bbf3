"""`-cpu MODEL,FEATURES`: there is one processor, so models are names for it, and features are compared with its own.

A feature that the guest will not see as asked is a warning, as for QEMU's own emulated processor. The Hyper-V
interface is always there whole, so its features decide nothing, but hv-vsm: with it the guest may bring code for VTL1.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtlab.errors import BadArgument

# What the processor shows: QEMU's name -> CPUID leaf, register (0 to 3: EAX, EBX, ECX, EDX) and bit.
SHOWN: dict[str, tuple[int, int, int]] = {
    "fpu": (1, 3, 0),
    "pse": (1, 3, 3),
    "tsc": (1, 3, 4),
    "msr": (1, 3, 5),
    "pae": (1, 3, 6),
    "apic": (1, 3, 9),
    "pge": (1, 3, 13),
    "pat": (1, 3, 16),
    "sse": (1, 3, 25),
    "sse2": (1, 3, 26),
    "pni": (1, 2, 0),
    "ssse3": (1, 2, 9),
    "cx16": (1, 2, 13),
    "sse4.1": (1, 2, 19),
    "sse4.2": (1, 2, 20),
    "x2apic": (1, 2, 21),
    "movbe": (1, 2, 22),
    "popcnt": (1, 2, 23),
    "tsc-deadline": (1, 2, 24),
    "aes": (1, 2, 25),
    "xsave": (1, 2, 26),
    "rdrand": (1, 2, 30),
    "hypervisor": (1, 2, 31),
    "fsgsbase": (7, 1, 0),
    "smep": (7, 1, 7),
    "smap": (7, 1, 20),
    "umip": (7, 2, 2),
    "syscall": (0x80000001, 3, 11),
    "nx": (0x80000001, 3, 20),
    "pdpe1gb": (0x80000001, 3, 26),
    "rdtscp": (0x80000001, 3, 27),
    "lm": (0x80000001, 3, 29),
    "invtsc": (0x80000007, 3, 8),
}
# Properties with a value that the processor has. Of others, the guest sees what it sees.
FIXED = {"vendor": "AuthenticAMD", "phys-bits": "40"}
# Where the host's processor would be seen, which it is not.
MEANINGLESS = ("migratable", "host-phys-bits", "check", "enforce", "kvm", "l3-cache")
HYPERV = (
    "hv-passthrough",
    "hv-crash",
    "hv-frequencies",
    "hv-ipi",
    "hv-no-nonarch-coresharing",
    "hv-relaxed",
    "hv-reset",
    "hv-runtime",
    "hv-spinlocks",
    "hv-stimer",
    "hv-stimer-direct",
    "hv-synic",
    "hv-time",
    "hv-tlbflush",
    "hv-tlbflush-direct",
    "hv-tlbflush-ext",
    "hv-vapic",
    "hv-vpindex",
    "hv-vsm",
    "hv-xmm-input",
    "hv-xmm-output",
)


@dataclass(frozen=True)
class Features:
    """What -cpu says.

    Attributes:
        vsm: the guest may bring code for VTL1, as under KVM.
        warnings: wishes that the guest will not see granted, for people.
    """

    vsm: bool = False
    warnings: tuple[str, ...] = ()


def parse_cpu(text: str) -> Features:
    """Reads -cpu MODEL[,+FEATURE][,-FEATURE][,FEATURE][,NAME=VALUE]. Raises BadArgument for an unknown hv-*."""
    model, *words = text.split(",")
    if not model or model[0] in "+-" or "=" in model:
        raise BadArgument(f"-cpu {text}", "expected the name of a model first")
    vsm = False
    warnings: list[str] = []
    for word in words:
        name, value = _feature(word)
        if name.startswith("hv-"):
            if name not in HYPERV:
                raise BadArgument(f"-cpu {model}: '{name}'", "is not supported")
            if name == "hv-vsm":
                vsm = value == "on"
        elif name not in MEANINGLESS and (complaint := _complaint(name, value)):
            warnings.append(complaint)
    return Features(vsm, tuple(warnings))


def _feature(word: str) -> tuple[str, str]:
    """Name, with dashes as QEMU spells it, and value."""
    sign = {"+": "on", "-": "off"}.get(word[:1])
    name, equals, value = (word[1:] if sign else word).partition("=")
    return name.replace("_", "-"), value if equals else sign or "on"


def _complaint(name: str, value: str) -> str:
    """Why a wish is not granted; empty if it is."""
    if name in FIXED:
        return "" if value == FIXED[name] else f"CPU property '{name}' is {FIXED[name]}, not {value}"
    if value not in ("on", "off"):
        return f"CPU property '{name}={value}' has no effect"
    if value == "on" and name not in SHOWN:
        return f"CPU feature '{name}' is not offered"
    if value == "off" and name in SHOWN:
        return f"CPU feature '{name}' cannot be hidden"
    return ""
