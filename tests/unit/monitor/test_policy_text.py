"""Policies good and bad: each problem has its line and its dotted key, and nothing is half accepted."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor.conftest import POLICY
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.text import PolicyText, parse
from vtlab.v1 import monitor_pb2

HEAD = "version: 1\nname: x\n"

# text -> (line, key, part of the message) of the first problem
BAD = {
    "": (1, "", "is empty"),
    "word": (1, "", "must be a mapping"),
    "- 1\n": (1, "", "must be a mapping"),
    "name: x\n": (1, "version", "is missing"),
    "version: 2\nname: x\n": (1, "version", "must be 1"),
    "version: '1'\nname: x\n": (1, "version", "must be 1"),
    "version: 1\nname: 5\n": (2, "name", "must be a valid string"),
    HEAD + "colour: red\n": (3, "colour", "unknown key"),
    HEAD + "name: y\n": (3, "name", "appears twice, first on line 2"),
    HEAD + "registers:\n  cr0: {must_be_1: [WP, XX]}\n": (4, "registers.cr0.must_be_1.1", "CR0 has no bit 'XX'"),
    HEAD + "registers:\n  cr0: {must_be_1: [64]}\n": (4, "registers.cr0.must_be_1.0", "not between 0 and 63"),
    HEAD + "registers:\n  cr0: {must_be_1: [true]}\n": (4, "registers.cr0.must_be_1.0", "name of a bit"),
    HEAD + "registers:\n  cr0: {must_be_1: WP}\n": (4, "registers.cr0.must_be_1", "must be a valid list"),
    HEAD + "registers:\n  cr0:\n    must_be_1: [WP]\n    must_be_0: [WP]\n": (6, "registers.cr0.must_be_0", "also in"),
    HEAD + "registers:\n  cr0: thawed\n": (4, "registers.cr0", "must be 'frozen', 'watched' or a mapping"),
    HEAD + "registers: {cr5: frozen}\n": (3, "registers.cr5", "unknown key"),
    HEAD + "registers:\n  gdtr: watched\n": (4, "registers.gdtr", "must be 'frozen'"),
    HEAD + "registers:\n  cr3: page_tables\n": (4, "registers.cr3", "needs page_tables.guard"),
    HEAD + "registers: {cr3: page_tables}\npage_tables:\n  guard: true\n  when: end_of_boot\n": (
        6,
        "page_tables.when",
        "guarded when registers are locked",
    ),
    HEAD + "msrs:\n  LSTAR: frozen\n  NOPE: frozen\n": (5, "msrs.NOPE", "no MSR 'NOPE'"),
    HEAD + "msrs:\n  EFER: frozen\n": (4, "msrs.EFER", "pinned under 'registers'"),
    HEAD + "msrs:\n  LSTAR: frozen\n  0xC0000082: frozen\n": (5, "msrs.0xC0000082", "same MSR as 'LSTAR'"),
    HEAD + "msrs:\n  PAT: {value: 1, frozen: true}\n": (4, "msrs.PAT.value", "fixes every bit"),
    HEAD + "msrs:\n  PAT: {value: -1}\n": (4, "msrs.PAT.value", "greater than or equal to 0"),
    HEAD + "msrs:\n  PAT: {value: 0x10000000000000000}\n": (4, "msrs.PAT.value", "less than or equal to"),
    HEAD + "msrs:\n  PAT: {must_be_1: [WP]}\n": (4, "msrs.PAT.must_be_1.0", "have no names"),
    HEAD + "memory:\n- {name: a, section: .t, access: rx}\n": (4, "memory.0.access", "three characters"),
    HEAD + "memory:\n- {name: a, access: r--}\n": (4, "memory.0", "exactly one of section"),
    HEAD + "memory:\n- {name: a, section: .t, symbol: s, access: r--}\n": (4, "memory.0", "has section and symbol"),
    HEAD + "memory:\n- {name: a, gpa: 0x1000, access: r--}\n": (4, "memory.0.gpa", "needs 'size'"),
    HEAD + "memory:\n- {name: a, gpa: 0x1000, size: 0, access: r--}\n": (4, "memory.0.size", "greater than 0"),
    HEAD + "memory:\n- {name: a, section: .t, size: 1, access: r--}\n": (4, "memory.0.size", "is for symbol"),
    HEAD + "memory:\n- {name: a, section: .t, access: rwx}\n": (4, "memory.0.access", "may not be writable"),
    HEAD + "memory:\n- {name: a, section: .t, access: -w-}\n": (4, "memory.0.access", "can be read"),
    HEAD + "memory:\n- {name: a, section: .t, access: r-x, execute: none}\n": (4, "memory.0.execute", "contradicts"),
    HEAD + "memory:\n- {name: a, section: .t, access: r--, execute: both}\n": (4, "memory.0.execute", "contradicts"),
    HEAD + "memory:\n- {name: a, section: .t, access: r--, private: true}\n": (4, "memory.0.private", "access '---'"),
    HEAD + "memory:\n- {name: a, section: .t, access: rw-, measure: true}\n": (4, "memory.0.measure", "cannot write"),
    HEAD + "memory:\n- {name: a, section: .t, access: r--, when: later}\n": (4, "memory.0.when", "lock, end_of_boot"),
    HEAD + "memory:\n- {name: cr3, section: .t, access: r--}\n": (4, "memory.0.name", "name of another rule"),
    HEAD + "memory:\n- {name: a, section: .t, access: r--}\n- {name: a, section: .u, access: r--}\n": (
        5,
        "memory.1.name",
        "name of another rule",
    ),
    HEAD + "memory:\n- {name: a, default: true, access: r--}\n- {name: b, default: true, access: r--}\n": (
        5,
        "memory.1.default",
        "one default rule",
    ),
    HEAD + "violation: {default: explode}\n": (3, "violation.default", "gp, skip, log, halt, reset"),
    HEAD + "violation:\n  cr7: gp\n": (4, "violation.cr7", "no rule is called 'cr7'"),
    HEAD + "violation: {measurement: gp}\n": (3, "violation.measurement", "refuse, halt, reset"),
    HEAD + "memory:\n- {name: p, section: .t, access: ---, private: true}\nviolation:\n  p: log\n": (
        6,
        "violation.p",
        "never opened",
    ),
    HEAD + "services: [FLY]\n": (3, "services.0", "no service 'FLY'"),
    HEAD + "actions:\n  a: {public_key: '12'}\n": (4, "actions.a.public_key", "match pattern"),
    HEAD + f"actions:\n  a: {{public_key: '{'a' * 64}', allows: [cr0]}}\n": (4, "actions.a.allows.0", "called 'cr0'"),
    HEAD + f"actions:\n  a: {{public_key: '{'a' * 64}', services: [TAKE_POLICY]}}\n": (
        4,
        "actions.a.services.0",
        "never granted",
    ),
    HEAD + "patches: {}\n": (3, "patches.section", "is missing"),
    HEAD + "page_tables: {guard: yes}\n": (3, "page_tables.guard", "write true or false"),
    HEAD + "x: &a 1\n": (3, "", "anchors and aliases"),
    HEAD + "x: *a\n": (3, "", "anchors and aliases"),
    HEAD + "x: !!python/object:os.system ls\n": (3, "", "tags are not allowed"),
    HEAD + "x: !!str 1\n": (3, "", "tags are not allowed"),
    HEAD + "---\n" + HEAD: (3, "", "second document"),
    HEAD + "x: [[[[[[[[[1]]]]]]]]]\n": (3, "", "nested deeper"),
    HEAD + "x: [1,\n": (4, "", "expected"),
    HEAD + "? [a]\n: b\n": (3, "", "a key must be a word"),
    HEAD + "x: 1" + "0" * 5000 + "\n": (3, "x", "is no decimal or 0x number"),
    HEAD + "<<: {a: b}\n": (3, "<<", "unknown key"),
    HEAD + "#" * (64 << 10): (0, "", "more than 65536"),
    HEAD + "x: '\x01'\n": (3, "", "which YAML forbids"),
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_policy_tells_line_and_key(text: str) -> None:
    line, key, message = BAD[text]
    with pytest.raises(PolicyProblems) as caught:
        parse(text, "p.yaml")
    error = caught.value
    assert (error.line, error.key) == (line, key)
    assert message in error.detail
    assert str(error).startswith(f"p.yaml:{line}: " if line else "p.yaml: ")
    assert "\n" not in str(error)


def test_all_problems_are_told_in_order() -> None:
    text = HEAD + "registers:\n  cr0: {must_be_1: [XX]}\n  cr9: frozen\nservices: [FLY]\n"
    with pytest.raises(PolicyProblems) as caught:
        parse(text)
    assert [(one.line, one.key) for one in caught.value.problems] == [
        (4, "registers.cr0.must_be_1.0"),
        (5, "registers.cr9"),
        (6, "services.0"),
    ]


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(PolicyProblems, match="p:2: is not UTF-8 at byte 11"):
        parse(b"version: 1\n\xff", "p")


def test_the_whole_language() -> None:
    parsed = parse(POLICY)
    assert parsed.model.registers.cr4 is not None
    assert parsed.model.registers.cr4.must_be_1 == [1 << 20, 1 << 21, 1 << 11]
    assert parsed.model.registers.gdtr == "frozen"
    assert parsed.lines["memory", 1] == 19


@given(st.text(alphabet="abc:{}[]-,# \n'\"&*!?|>0x%@~", max_size=200))
def test_no_text_breaks_the_parser(text: str) -> None:
    with pytest.raises(PolicyProblems):
        parse(text)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    with pytest.raises(PolicyProblems):
        parse(data)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 70)
    | st.text(max_size=5)
    | st.sampled_from(["frozen", "r-x", "WP"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)
_keys = ("registers", "msrs", "memory", "page_tables", "violation", "modules", "patches", "services", "actions")


@given(st.dictionaries(st.sampled_from(_keys), _json, max_size=3))
def test_every_structure_is_taken_or_refused_whole(extra: dict[str, object]) -> None:
    text = yaml.safe_dump({"version": 1, "name": "x", **extra}, allow_unicode=True)
    outcome: object
    try:
        outcome = parse(text)
    except PolicyProblems as error:
        outcome = error.problems[0]
    assert isinstance(outcome, PolicyText | monitor_pb2.PolicyProblem)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 65000,
        "{a: " * 16000,
        "- " * 32000,
        "a" * 65000,
        "? " * 32000,
        "\n" * 65000,
        "x:\n " * 16000,
        "a: 1\n" * 13000,
    ],
    ids=range(8),
)
def test_hostile_text_ends_in_few_problems(text: str) -> None:
    with pytest.raises(PolicyProblems) as caught:
        parse(text)
    assert len(caught.value.problems) <= 64
