"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one value a line.")]
Vmm = Annotated[str, typer.Option("--vmm", metavar="ADDRESS", help="VMM of a running laboratory [VTLAB_VMM].")]
Monitor = Annotated[str, typer.Option("--monitor", metavar="ADDRESS", help="Its monitor [VTLAB_MONITOR].")]
Trust = Annotated[str, typer.Option("--trust", metavar="FOLDER", help="Our certificate [VTLAB_TRUST].")]
Rules = Annotated[str, typer.Option("--rules", metavar="FILE", help="Python file that defines `rules` for VTL1.")]
Vm = Annotated[str, typer.Option("--vm", metavar="NAME", help="Machine; not needed if there is only one.")]
Design = Annotated[
    str, typer.Option("--design", metavar="NAME", help="How the guest may protect itself: docs/designs.md.")
]
VpIndex = Annotated[int, typer.Option("--vp", min=0, help="vCPU.")]
