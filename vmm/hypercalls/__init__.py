"""Hypercalls: the ABI as pure decoding, one table of calls, and the rules of each as data."""

from vmm.hypercalls.abi import Shape
from vmm.hypercalls.synic_calls import POST_MESSAGE_SIZE, SIGNAL_EVENT_SIZE, post_message, signal_event
from vmm.hypercalls.table import Hypercalls, Row
from vmm.hypercalls.vp_registers import get_vp_registers, set_vp_registers
from vmm.hypercalls.vsm_calls import (
    ENABLE_VP_VTL_SIZE,
    enable_partition_vtl,
    enable_vp_vtl,
    modify_vtl_protection_mask,
)
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.layouts import (
    ENABLE_PARTITION_VTL_SIZE,
    REGISTER_ASSOCIATION_SIZE,
    REGISTER_VALUE_SIZE,
    VP_HEADER_SIZE,
)

__all__ = ["HYPERCALLS"]

# The VTL switches are not here: they take no input, give no status, and are served before (vmm.exits).
HYPERCALLS = Hypercalls(
    {
        HypercallCode.MODIFY_VTL_PROTECTION_MASK: Row(Shape(16, element_in=8), modify_vtl_protection_mask),
        HypercallCode.ENABLE_PARTITION_VTL: Row(Shape(ENABLE_PARTITION_VTL_SIZE), enable_partition_vtl),
        HypercallCode.ENABLE_VP_VTL: Row(Shape(ENABLE_VP_VTL_SIZE, fast=False), enable_vp_vtl),
        HypercallCode.GET_VP_REGISTERS: Row(
            Shape(VP_HEADER_SIZE, element_in=4, element_out=REGISTER_VALUE_SIZE), get_vp_registers
        ),
        HypercallCode.POST_MESSAGE: Row(Shape(POST_MESSAGE_SIZE, fast=False), post_message),
        HypercallCode.SIGNAL_EVENT: Row(Shape(SIGNAL_EVENT_SIZE), signal_event),
        HypercallCode.SET_VP_REGISTERS: Row(
            Shape(VP_HEADER_SIZE, element_in=REGISTER_ASSOCIATION_SIZE), set_vp_registers
        ),
    }
)
