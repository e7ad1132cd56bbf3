"""`vtlab demo` and `vtlab attack`: the commands; what they do is in vmm.cli.demo and vtlab_attacks."""

from __future__ import annotations

from typing import Annotated

import typer

from vmm.cli import laboratory, options


def demo(
    design: options.Design = "vtl",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Attack a real guest, first unprotected and then protected; exit code 0 if all went as it must.

    Under another design than vtl nothing has to be blocked: it is recorded what is.
    """
    from vmm.cli import demo as body

    with laboratory.given_or_private(vmm, monitor, trust, as_json=as_json) as lab:
        return body.demo(lab, as_json, design)


def attack(
    names: Annotated[
        list[str] | None, typer.Argument(help="Attacks or legitimate operations; none lists them.")
    ] = None,
    design: options.Design = "vtl",
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
    as_json: options.Json = False,
) -> int:
    """Run attacks by name, without VTL1 and with it; exit code 0 if each came out as it must."""
    from vmm.cli import demo as body

    if not names:
        return body.list_attacks(as_json)
    body.select(names)  # an unknown name costs no start
    with laboratory.given_or_private(vmm, monitor, trust, as_json=as_json) as lab:
        return body.attack(lab, names, as_json, design)
