"""Policies that lack one rule each."""

from __future__ import annotations

import yaml

from tests.unit.matrix.made import Runner, attack
from vtl1_monitor.policy.text import parse
from vtlab_matrix.cells import Verdict
from vtlab_matrix.mutations import mutations, run_mutations, shipped_policy

POLICY = """
version: 1
name: small
registers:
  cr0: {must_be_1: [WP, NE], watched: [TS]}
  cr3: page_tables
msrs: {LSTAR: frozen, KERNEL_GS_BASE: watched}
memory:
  - {name: text, section: .text, access: r-x}
  - {name: the rest, default: true, access: rw-}
page_tables: {guard: true}
violation: {default: gp}
"""


def test_each_rule_is_taken_out_once() -> None:
    found = {name: yaml.safe_load(text) for name, text in mutations(POLICY).items()}
    assert list(found) == [
        "registers: cr0.WP must_be_1",
        "registers: cr0.NE must_be_1",
        "registers: cr3",
        "msrs: LSTAR",
        "memory: text",
        "memory: the rest",
        "page_tables",
    ]
    whole = yaml.safe_load(POLICY)
    assert found["registers: cr0.WP must_be_1"]["registers"]["cr0"] == {"must_be_1": ["NE"], "watched": ["TS"]}
    assert found["memory: text"]["memory"] == whole["memory"][1:]
    assert found["page_tables"]["registers"] == {"cr0": whole["registers"]["cr0"]}
    assert all(one["violation"] == whole["violation"] for one in found.values())


def test_what_is_left_of_the_shipped_policy_is_a_policy() -> None:
    every = mutations(shipped_policy())
    assert len(every) > 30
    for name, text in every.items():
        assert parse(text) is not None, name


def test_a_cell_that_is_red_anyway_needs_no_rule() -> None:
    runner = Runner(attack(Verdict.SUCCEEDED, name="cr0-wp"))
    red = run_mutations(runner, ["msrs: LSTAR"], lambda _outcome: None, ["cr0-wp", "msr-lstar"], POLICY)
    assert red == {"msrs: LSTAR": []}
