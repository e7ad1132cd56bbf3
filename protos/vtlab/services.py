"""Services that VTL1's policy personality offers to VTL0 by VTL call: numbers and memory layouts.

The kernel calls through the hypercall page with RDI = service and RSI, RDX, R8 = arguments; the result is a signed
64-bit value in R8: 0 or positive for success, a negated Linux errno for a refusal, as in LVBS
(litebox_platform_lvbs/src/mshv/vsm.rs, lvbs-linux hv_vsm.c). Numbers from 0x1FFE0 are those of LVBS; those from 0x1FF00
are ours, for what LVBS has no service for. docs/policy.md has the same as tables, with the refusals of each service.

All addresses are guest-physical, all fields little-endian. VTL1 reads each argument structure exactly once.
"""

from enum import IntEnum
from struct import Struct


class Service(IntEnum):
    """Service number, as in RDI. Arguments in the order RSI, RDX, R8."""

    TAKE_POLICY = 0x1FF00
    """(pa, size): the policy text of the guest, in its own memory, any alignment, at most MAX_POLICY_SIZE bytes.
    Resolves it against the boot image, seals memory, measures what was sealed against the image. Once only."""
    WRITE_PAGE_TABLE = 0x1FF01
    """(pa, value, operation): see PageTableOperation."""
    WRITE_CONTROL_REGISTER = 0x1FF02
    """(0 or 4, value): for kernels whose own code for it was removed; judged like the write itself."""
    CHALLENGE = 0x1FF03
    """(pa of NONCE_SIZE bytes): VTL1 writes a fresh nonce there; it replaces the one before."""
    AUTHENTICATE = 0x1FF04
    """(pa, size): an AUTHENTICATE_REQUEST that answers the last nonce; grants the named action once."""
    PING = 0x1FF05
    """(): no-op that returns 0; for measuring a VTL call."""

    LOCK_REGS = 0x1FFE2
    """(): on each vCPU. From here the policy's pins on registers, tables and MSRs hold on it."""
    SIGNAL_END_OF_BOOT = 0x1FFE3
    """(): applies rules with `when: end_of_boot` and ends the boot-only services."""
    PROTECT_MEMORY = 0x1FFE4
    """(pa of a HEKI_PAGE, number of ranges): attributes are Rights. Boot only; can only tighten the policy."""
    LOAD_KDATA = 0x1FFE5
    """(pa of a HEKI_PAGE, number of ranges): attributes are KdataType. Boot only; only from sealed, measured memory."""
    VALIDATE_MODULE = 0x1FFE6
    """(pa of a HEKI_PAGE, number of ranges, flags = 0): attributes are ModuleType. Returns a token above 0."""
    FREE_MODULE_INIT = 0x1FFE7
    """(token): init sections become ordinary memory, ro_after_init becomes read-only."""
    UNLOAD_MODULE = 0x1FFE8
    """(token): all memory of the module becomes ordinary memory."""
    KEXEC_VALIDATE = 0x1FFEA
    """(pa of a HEKI_PAGE, number of ranges, crash): attributes are KexecType. Seals a signed kernel image for
    KEXEC_EXECUTE; what was sealed for the same purpose before is ordinary memory again. pa 0: only that."""
    KEXEC_EXECUTE = 0x1FF06
    """(crash): VTL1 starts the image that it sealed, and stands down. Comes back only where it refuses."""
    UPGRADE = 0x1FF07
    """(pa, size): a signed policy, newer than the one in force, takes its place: UPGRADE_HEADER, the text, a signature
    as of a module file over both."""
    HIBERNATE = 0x1FF08
    """(pa of an image, pages of room): seals a copy of memory that VTL0 has made for a disk, and puts what VTL1 needs
    to go on behind it, encrypted; returns the bytes of that. pa 0: VTL0 goes on instead, and the copy is its own again.
    See HIBERNATION_HEADER."""
    RESTORE = 0x1FF09
    """(pa of an image, pages): before TAKE_POLICY only. VTL1 puts the machine back to where HIBERNATE was called, and
    VTL0 goes on there. Comes back only if nothing was tried; an image that is not the one is a RESET."""
    PATCH_TEXT = 0x1FFEB
    """(pa of a HEKI_PATCH, pa of the page its rest is in or 0): writes one listed patch into sealed text."""


BOOT_ONLY = frozenset(
    {Service.TAKE_POLICY, Service.LOCK_REGS, Service.SIGNAL_END_OF_BOOT, Service.PROTECT_MEMORY, Service.LOAD_KDATA}
)
"""Refused with -EPERM once SIGNAL_END_OF_BOOT succeeded."""

MAX_POLICY_SIZE = 64 << 10
"""Bytes of policy text."""
MAX_MODULE_SIZE = 64 << 20
"""Bytes of a module's ELF file, signature included (as in LVBS)."""
MAX_RANGES = 4096
"""Ranges in one chain of HEKI_PAGEs."""
NONCE_SIZE = 32

HEKI_PAGE = Struct("<QQQ")
"""Head of a page-aligned 4 KiB page: next (a pointer of the guest, ignored), next_pa (0 ends the chain), nranges.
At most HEKI_PAGE_RANGES of HEKI_RANGE follow at once; the second argument of the call is the sum over the chain."""
HEKI_RANGE = Struct("<QQQQ")
"""va, pa, epa (first byte after the range), attributes."""
HEKI_PAGE_RANGES = 127

HEKI_PATCH = Struct("<QQB5s2x")
"""pa[0]: first byte of the target; pa[1]: the target's next page where the patch crosses into it, else 0; size in
bytes, 1 to 5; code, `size` bytes of it used; two bytes of padding. 24 bytes."""
PATCH_RECORD = Struct("<QQB5s2x")
"""One entry of a precomputed patch list (policy `patches.section`, or LOAD_KDATA type PATCH_INFO): linked virtual
address of the target, 0, size 1 to 5, replacement code. 24 bytes; records of zeros are skipped."""

ACTION_NAME_SIZE = 32
AUTHENTICATE_REQUEST = Struct("<32s64s")
"""Name of the action padded with NULs; Ed25519 signature by the action's key of
AUTHENTICATE_CONTEXT + nonce (32 bytes) + the padded name. 96 bytes."""
AUTHENTICATE_CONTEXT = b"vtlab authenticate v1\0"


UPGRADE_MAGIC = b"vtlab policy 1\0\0"
UPGRADE_HEADER = Struct("<16sI4x")
"""UPGRADE_MAGIC; version, above that of the policy in force (the guest's first one has 0)."""


class PageTableOperation(IntEnum):
    """Third argument (R8) of WRITE_PAGE_TABLE."""

    WRITE = 0
    """pa: of one 8-byte entry in a guarded table page; value: its new content. An entry that refers to a table page not
    guarded yet makes VTL1 seal and validate that page, and those below it, first."""
    ADD_ROOT = 1
    """pa: of a page-table root (4 KiB) that VTL0 wants to load into CR3; value: 0. It is sealed and validated."""
    RELEASE = 2
    """pa: of a guarded table page that no guarded table refers to any more; value: 0. It becomes ordinary memory."""


class Rights(IntEnum):
    """Attribute bits of PROTECT_MEMORY."""

    READ = 1
    WRITE = 2
    EXECUTE = 4


class KdataType(IntEnum):
    """Attributes of LOAD_KDATA that are taken; others are refused with -ENOTSUP (95)."""

    SYSTEM_CERTIFICATES = 0
    REVOCATION_CERTIFICATES = 1
    PATCH_INFO = 5


class ModuleType(IntEnum):
    """Attributes of VALIDATE_MODULE. Ranges of one type are taken together, in the order given."""

    TEXT = 0
    DATA = 1
    RODATA = 2
    RO_AFTER_INIT = 3
    INIT_TEXT = 4
    INIT_DATA = 5
    INIT_RODATA = 6
    ELF = 7


class KexecType(IntEnum):
    """Attributes of KEXEC_VALIDATE. One KIMAGE of at most a page; KERNEL ranges are taken together, in order."""

    KIMAGE = 0
    """KEXEC_KIMAGE, then KEXEC_MODULE for each: what the next kernel finds as multiboot modules. Not signed: a kernel
    does not trust them."""
    KERNEL = 1
    """The signed image: KEXEC_HEADER, command line, an ELF kernel, a signature as of a module file over all of it."""
    PAGES = 2
    """For crash: where what the next kernel will lie on is kept, in one piece."""


MAX_KEXEC_SIZE = 64 << 20
"""Bytes of a signed kernel image."""
KEXEC_MAGIC = b"vtlab kexec 1\0\0\0"
KEXEC_HEADER = Struct("<16sIII4x")
"""KEXEC_MAGIC; version, which may not be below the policy's; KexecEntry; bytes of the command line that follows, padded
with zeros to a multiple of 8. The ELF file is behind it."""
KEXEC_KIMAGE = Struct("<Q8x")
"""Number of modules, at most KEXEC_MODULES."""
KEXEC_MODULE = Struct("<QQ32s")
"""First byte, byte after the last, command line padded with NULs."""
KEXEC_MODULES = 64


HIBERNATION_MAGIC = b"vtlab memory 1\0\0"
HIBERNATION_HEADER = Struct("<16sQQQQ")
"""First page of an image, page-aligned and in one piece: HIBERNATION_MAGIC; number of pages that are kept; bytes of
VTL1's state, written by VTL1; RIP and RSP at which vCPU 0 goes on. The rest of the page is the kernel's own. Then
follow the numbers of the kept guest pages (u64, whole pages), these pages in that order, and VTL1's state."""
MAX_HIBERNATION_STATE = 16 << 20
"""Bytes of VTL1's state."""
SEALED_STATE_HEADER = Struct("<16s32sQ12s")
"""Head of VTL1's state: SEALED_STATE_MAGIC; SHA-256 of the machine's name; number of the image; nonce. AES-256-GCM
follows, which authenticates this head. The key stays with the monitor."""
SEALED_STATE_MAGIC = b"vtlab state 1\0\0\0"


class KexecEntry(IntEnum):
    """How a kernel image is entered."""

    MULTIBOOT = 1
    """32-bit protected mode without paging, EAX and EBX as of multiboot 1."""


MODULE_SIGNATURE_MAGIC = b"~Module signature appended~\n"
MODULE_SIGNATURE = Struct(">BBBBB3xI")
"""Between the signature and the magic, at the end of a module file (Linux include/linux/module_signature.h): algo,
hash, id_type, signer_len, key_id_len, three bytes of padding, length of the signature. id_type 2 is PKCS#7; all other
fields but the length are then 0."""
PKEY_ID_PKCS7 = 2
