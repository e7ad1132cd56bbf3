"""Rights that VTL1's own code gives: no page gets more than its rule, whatever the runs look like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vtl1_monitor import rights
from vtl1_monitor.policy.rules import MemoryRule, Rules
from vtl1_monitor.policy.schema import Phase, Violation
from vtl1_monitor.protection_judge import judge_protection
from vtl1_monitor.rights import Run
from vtlab.v1 import vcpu_pb2

PAGES = 24
CODES = [code for code in range(16) if code & rights.READ or not code]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    first = draw(st.integers(0, PAGES - 1))
    return Run(first, draw(st.integers(1, PAGES - first)))


@st.composite
def some_rules(draw: st.DrawFn) -> Rules:
    memory = tuple(
        MemoryRule(f"rule {n}", run, draw(st.sampled_from(CODES)), (0, 0), Phase.LOCK, Violation.GP, False, 1, "")
        for n, run in enumerate(draw(st.lists(runs(), max_size=4)))
    )
    return Rules(memory=memory, default_code=draw(st.none() | st.sampled_from(CODES)), default_name="default")


@given(some_rules(), st.lists(runs(), min_size=1, max_size=4), st.sampled_from(CODES))
def test_it_says_what_page_by_page_says(rules: Rules, given_runs: list[Run], code: int) -> None:
    update = rights.protection_update(code, given_runs)
    verdict = judge_protection(rules, vcpu_pb2.Protect(protections=[update]))
    refused = False
    for page in {page for run in given_runs for page in range(run.first, run.end)}:
        covering = [rule.code for rule in rules.memory if rule.run.first <= page < rule.run.end]
        if not covering and rules.default_code is not None:
            covering = [rules.default_code]
        refused |= any(code & ~allowed for allowed in covering)
    assert verdict.allowed is not refused
    assert bool(verdict.rule) is refused


def test_what_is_logged_happens() -> None:
    rule = MemoryRule("text", Run(1, 1), rights.READ, (0, 0), Phase.LOCK, Violation.LOG, False, 1, "")
    protect = vcpu_pb2.Protect(protections=[rights.protection_update(rights.READ | rights.WRITE, [Run(0, 2)])])
    verdict = judge_protection(Rules(memory=(rule,)), protect)
    assert (verdict.allowed, verdict.rule) == (True, "text")
    assert "from 0x1000" in verdict.resolution.reason
