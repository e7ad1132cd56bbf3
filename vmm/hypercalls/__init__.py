"""Hypercalls: the ABI as pure decoding, one table of calls, and the rules of each as data."""

from vmm.hypercalls.abi import Shape
from vmm.hypercalls.cluster_ipi import (
    CLUSTER_IPI_EX_HEADER_SIZE,
    CLUSTER_IPI_FAILS,
    CLUSTER_IPI_HEADER_SIZE,
    send_cluster_ipi,
    send_cluster_ipi_ex,
)
from vmm.hypercalls.flush import (
    FLUSH_EX_HEADER_SIZE,
    FLUSH_HEADER_SIZE,
    flush_list,
    flush_list_ex,
    flush_space,
    flush_space_ex,
)
from vmm.hypercalls.install_intercept import INSTALL_INTERCEPT_FAILS, install_intercept
from vmm.hypercalls.synic_calls import (
    POST_MESSAGE_FAILS,
    POST_MESSAGE_SIZE,
    SIGNAL_EVENT_FAILS,
    SIGNAL_EVENT_SIZE,
    post_message,
    signal_event,
)
from vmm.hypercalls.table import Hypercalls, Row
from vmm.hypercalls.translate import (
    EX_OUTPUT_SIZE,
    OUTPUT_SIZE,
    translate_virtual_address,
    translate_virtual_address_ex,
)
from vmm.hypercalls.vp_registers import GET_FAILS, SET_FAILS, get_vp_registers, set_vp_registers
from vmm.hypercalls.vsm_calls import (
    APIC_ID_FAILS,
    APIC_ID_HEADER_SIZE,
    ENABLE_VP_VTL_SIZE,
    enable_partition_vtl,
    enable_vp_vtl,
    get_vp_index_from_apic_id,
    modify_vtl_protection_mask,
    start_virtual_processor,
)
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.layouts import (
    ENABLE_PARTITION_VTL_SIZE,
    INSTALL_INTERCEPT_SIZE,
    REGISTER_ASSOCIATION_SIZE,
    REGISTER_VALUE_SIZE,
    TRANSLATE_INPUT_SIZE,
    VP_HEADER_SIZE,
)
from vtlab.hyperv.status import HvStatus

__all__ = ["HYPERCALLS"]

_PARAMETER = (HvStatus.INVALID_PARAMETER,)
_DENIED = (HvStatus.ACCESS_DENIED,)
_SET_ROWS = Shape(VP_HEADER_SIZE, element_in=REGISTER_ASSOCIATION_SIZE)

# The VTL switches are not here: they take no input, give no status, and are served before (vmm.exits).
HYPERCALLS = Hypercalls(
    {
        HypercallCode.FLUSH_VIRTUAL_ADDRESS_SPACE: Row(
            Shape(FLUSH_HEADER_SIZE), flush_space, fails=_PARAMETER, looks=True
        ),
        HypercallCode.FLUSH_VIRTUAL_ADDRESS_LIST: Row(
            Shape(FLUSH_HEADER_SIZE, element_in=8), flush_list, fails=_PARAMETER, looks=True
        ),
        HypercallCode.FLUSH_VIRTUAL_ADDRESS_SPACE_EX: Row(
            Shape(FLUSH_EX_HEADER_SIZE, variable=True), flush_space_ex, fails=_PARAMETER, looks=True
        ),
        HypercallCode.FLUSH_VIRTUAL_ADDRESS_LIST_EX: Row(
            Shape(FLUSH_EX_HEADER_SIZE, element_in=8, variable=True), flush_list_ex, fails=_PARAMETER, looks=True
        ),
        HypercallCode.SEND_SYNTHETIC_CLUSTER_IPI: Row(
            Shape(CLUSTER_IPI_HEADER_SIZE), send_cluster_ipi, fails=CLUSTER_IPI_FAILS, looks=True
        ),
        HypercallCode.SEND_SYNTHETIC_CLUSTER_IPI_EX: Row(
            Shape(CLUSTER_IPI_EX_HEADER_SIZE, variable=True), send_cluster_ipi_ex, fails=CLUSTER_IPI_FAILS, looks=True
        ),
        HypercallCode.MODIFY_VTL_PROTECTION_MASK: Row(
            Shape(16, element_in=8),
            modify_vtl_protection_mask,
            rules="modify_vtl_protection_mask",
            fails=_PARAMETER,
        ),
        HypercallCode.ENABLE_PARTITION_VTL: Row(
            Shape(ENABLE_PARTITION_VTL_SIZE), enable_partition_vtl, rules="enable_partition_vtl"
        ),
        HypercallCode.ENABLE_VP_VTL: Row(
            Shape(ENABLE_VP_VTL_SIZE, fast=False), enable_vp_vtl, rules="enable_vp_vtl", fails=_DENIED
        ),
        HypercallCode.INSTALL_INTERCEPT: Row(
            Shape(INSTALL_INTERCEPT_SIZE), install_intercept, fails=INSTALL_INTERCEPT_FAILS
        ),
        HypercallCode.GET_VP_REGISTERS: Row(
            Shape(VP_HEADER_SIZE, element_in=4, element_out=REGISTER_VALUE_SIZE),
            get_vp_registers,
            empty=True,
            rules="get_vp_registers",
            fails=GET_FAILS,
            looks=True,
        ),
        HypercallCode.POST_MESSAGE: Row(Shape(POST_MESSAGE_SIZE, fast=False), post_message, fails=POST_MESSAGE_FAILS),
        HypercallCode.SIGNAL_EVENT: Row(Shape(SIGNAL_EVENT_SIZE), signal_event, fails=SIGNAL_EVENT_FAILS),
        HypercallCode.SET_VP_REGISTERS: Row(
            _SET_ROWS,
            set_vp_registers,
            columns=_SET_ROWS._replace(columns=(4, 16)),
            empty=True,
            rules="set_vp_registers",
            fails=SET_FAILS,
        ),
        HypercallCode.TRANSLATE_VIRTUAL_ADDRESS: Row(
            Shape(TRANSLATE_INPUT_SIZE, OUTPUT_SIZE),
            translate_virtual_address,
            rules="translate_virtual_address",
            looks=True,
        ),
        HypercallCode.TRANSLATE_VIRTUAL_ADDRESS_EX: Row(
            Shape(TRANSLATE_INPUT_SIZE, EX_OUTPUT_SIZE),
            translate_virtual_address_ex,
            rules="translate_virtual_address",
            looks=True,
        ),
        HypercallCode.START_VIRTUAL_PROCESSOR: Row(
            Shape(ENABLE_VP_VTL_SIZE, fast=False), start_virtual_processor, rules="start_virtual_processor"
        ),
        HypercallCode.GET_VP_INDEX_FROM_APIC_ID: Row(
            Shape(APIC_ID_HEADER_SIZE, element_in=4, element_out=4),
            get_vp_index_from_apic_id,
            fails=APIC_ID_FAILS,
            looks=True,
        ),
    }
)
