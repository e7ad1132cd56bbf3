"""Rights that guest code at VTL1 gives VTL0 -> whether a rule lets it. Pure.

A rule of memory is the most that VTL0 may have on its pages, the default rule on all others; what takes more away is
nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterable

from vtl1_monitor import rights
from vtl1_monitor.judge import REGISTER_ACTION, Verdict
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import Violation
from vtl1_monitor.rights import Run
from vtlab.v1 import vcpu_pb2

_PAGE = 4096


def judge_protection(rules: Rules, protect: vcpu_pb2.Protect) -> Verdict:
    """COMMIT if no page gets more than its rules allow; else what the first such rule's violation says."""
    for update in protect.protections:
        code = _given(update.access)
        for run in (Run(*pair) for pair in zip(update.runs[::2], update.runs[1::2], strict=False)):
            for name, violation, part, allowed in _ceilings(rules, run):
                more = code & rights.RIGHTS & ~allowed
                if more:
                    what = f"{rights.access_text(code)} for {part.pages} pages from {part.first * _PAGE:#x}"
                    reason = f"{name}: {what} is more than {rights.access_text(allowed)}"
                    return Verdict(vcpu_pb2.Resolution(action=REGISTER_ACTION[violation], reason=reason), name)
    reason = "no rule forbids these rights"
    return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason), "")


def _given(access: vcpu_pb2.PageAccess) -> int:
    return rights.page_code(
        read=access.read,
        write=access.write,
        kernel_execute=access.kernel_execute,
        user_execute=access.user_execute,
    )


def _ceilings(rules: Rules, run: Run) -> Iterable[tuple[str, Violation, Run, int]]:
    """The rules that cover pages of a run: name, violation, those pages, rights."""
    named = []
    for rule in rules.memory:
        first, end = max(run.first, rule.run.first), min(run.end, rule.run.end)
        if first < end:
            named.append(Run(first, end - first))
            yield rule.name, rule.violation, named[-1], rule.code
    if rules.default_code is None:
        return
    position = run.first
    for part in (*rights.merge(named), Run(run.end, 0)):
        if position < part.first:
            left = Run(position, part.first - position)
            yield rules.default_name, rules.violation(rules.default_name), left, rules.default_code
        position = part.end
