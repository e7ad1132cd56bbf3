"""A partition that may not use VSM."""

from __future__ import annotations

from vtlab.hyperv.registers import HvRegister as N
from vtlab_conformance import code
from vtlab_conformance.calls import UD, VTL1_TARGET, By, C, S, call, get, header, protect, row, run
from vtlab_conformance.layout import page
from vtlab_conformance.rows.before_vtl1 import enable
from vtlab_conformance.rows.vtl0_services import ipi, ipi_ex
from vtlab_conformance.steps import Row

_NONE = "3 Without AccessVSM"
_PRIVILEGES = 0x4000_0003


def rows(by: By) -> list[Row]:
    early = by(S.INVALID_VTL_STATE, S.INVALID_VTL_STATE, S.INVALID_PARAMETER)
    unset = by(S.ACCESS_DENIED, S.INVALID_PARAMETER, S.ACCESS_DENIED)
    return [
        row(
            "3.none.cpuid",
            _NONE,
            "CPUID does not offer AccessVSM",
            "TLFS",
            run(code.CPUID_EBX, 0, mask=1 << 16, rcx=_PRIVILEGES),
        ),
        row(
            "3.none.enable",
            _NONE,
            "HvCallEnablePartitionVtl",
            "openvmm",
            call(C.ENABLE_PARTITION_VTL, enable(1), S.ACCESS_DENIED),
        ),
        row(
            "3.none.enable-vp",
            _NONE,
            "HvCallEnableVpVtl",
            "openvmm; KUT",
            call(C.ENABLE_VP_VTL, header(vtl=1) + bytes(224), early),
        ),
        row(
            "3.none.protect",
            _NONE,
            "HvCallModifyVtlProtectionMask",
            "openvmm; TLFS",
            protect([page(0) >> 12], 0, unset, vtl=0),
        ),
        row("3.none.status", _NONE, "VsmVpStatus", "openvmm", get(N.VSM_VP_STATUS, status=S.ACCESS_DENIED)),
        row(
            "3.none.partition-status",
            _NONE,
            "VsmPartitionStatus",
            "openvmm",
            get(N.VSM_PARTITION_STATUS, status=S.ACCESS_DENIED),
        ),
        row(
            "3.none.capabilities", _NONE, "VsmCapabilities", "openvmm", get(N.VSM_CAPABILITIES, status=S.ACCESS_DENIED)
        ),
        row(
            "3.none.offsets",
            _NONE,
            "VsmCodePageOffsets",
            "openvmm",
            get(N.VSM_CODE_PAGE_OFFSETS, status=S.ACCESS_DENIED),
        ),
        row(
            "3.none.ipi",
            _NONE,
            "HvCallSendSyntheticClusterIpi to VTL1",
            "openvmm",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x54, target=VTL1_TARGET), S.ACCESS_DENIED),
        ),
        row(
            "3.none.ipi-ex",
            _NONE,
            "HvCallSendSyntheticClusterIpiEx to VTL1",
            "openvmm",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI_EX, ipi_ex(0x54, 1, target=VTL1_TARGET), S.ACCESS_DENIED, words=1),
        ),
        row("3.none.call", _NONE, "a VTL call is #UD", "TLFS", run(code.CALL_PAGE, vector=UD, rcx=C.VTL_CALL)),
    ]
