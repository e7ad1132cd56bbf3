"""docs/policy.md shows what works: its policy is accepted, its tables name the services and numbers that exist."""

from __future__ import annotations

import re
from pathlib import Path

from vtl1_monitor.policy.text import parse
from vtlab import services
from vtlab.services import Service

GUIDE = Path(__file__).parents[3] / "docs" / "policy.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def test_the_example_policy_is_accepted() -> None:
    (example,) = blocks("yaml")
    model = parse(example, "docs/policy.md").model
    assert model.name == "selfguard"
    assert set(model.model_fields_set) == set(type(model).model_fields)


def test_the_example_rule_does_what_it_says() -> None:
    from vtl1_monitor import api
    from vtl1_monitor.judge import Verdict
    from vtlab.v1 import vcpu_pb2

    (example,) = blocks("python")
    names: dict[str, object] = {"__name__": "example"}
    exec(example.partition("with launch")[0], names)
    (rule,) = api.load_rules(names["OneWriteOfLstar"]())  # type: ignore[operator]
    write = vcpu_pb2.Exit(msr=vcpu_pb2.MsrAccess(index=0xC0000082, write=True, new_value=1))
    verdict = Verdict(api.commit(), "")
    actions = [api.apply([rule], write, verdict, None).resolution.action for _ in range(2)]  # type: ignore[arg-type]
    assert actions == [vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_DENY]


def test_the_table_of_services_is_complete() -> None:
    rows = re.findall(r"^\| (0x1FF\w\w) \| (\w+)\(", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert {(int(number, 16), name) for number, name in rows} == {(int(one), one.name) for one in Service}


def test_sizes_are_those_of_the_layouts() -> None:
    sizes = {"HEKI_PAGE": 24, "HEKI_RANGE": 32, "HEKI_PATCH": 24, "PATCH_RECORD": 24, "AUTHENTICATE_REQUEST": 96}
    assert {name: getattr(services, name).size for name in sizes} == sizes
    assert services.MODULE_SIGNATURE.size == 12
    assert services.HEKI_PAGE.size + services.HEKI_PAGE_RANGES * services.HEKI_RANGE.size <= 4096
    assert len(services.AUTHENTICATE_CONTEXT) == 22
