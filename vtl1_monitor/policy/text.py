"""YAML text -> policy model. The text may come from a hostile guest: bounded, no anchors, aliases, tags or documents.

PyYAML gives the marks from which every problem takes its line; its constructors are not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.schema import Path, Policy, cross_checks
from vtlab.services import MAX_POLICY_SIZE
from vtlab.v1 import monitor_pb2

MAX_DEPTH = 8
MAX_NODES = 8192
MAX_KEY = 80
"""Characters of a key that are shown."""
MAX_PROBLEMS = 64
"""Problems reported of one text."""

_SCALAR_TAGS = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:bool": bool,
    "tag:yaml.org,2002:null": type(None),
}


def dotted(path: Path) -> str:
    """("memory", 2, "section") as "memory.2.section"."""
    return ".".join(str(part)[:MAX_KEY] for part in path)


@dataclass(frozen=True)
class PolicyText:
    """A parsed policy with the places of its keys.

    Attributes:
        model: what it says.
        text: as given.
        sha256: of the text as UTF-8.
        lines: path of a key or list item -> line, from 1.
        file_name: for error messages.
    """

    model: Policy
    text: str
    sha256: bytes
    lines: Mapping[Path, int]
    file_name: str

    def problem(self, path: Path, message: str) -> monitor_pb2.PolicyProblem:
        """A problem at a key of this policy."""
        return _problem(self.lines, path, message)


@lru_cache(maxsize=8)  # a kernel hands over the same text at each start, and what came of it never changes
def parse(text: bytes | str, file_name: str = "policy") -> PolicyText:
    """Parses and validates a policy; nothing of a bad one is returned.

    Raises:
        PolicyProblems: every problem with line and dotted key.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_POLICY_SIZE:
        raise _error(file_name, 0, (), f"has {len(data)} bytes, more than {MAX_POLICY_SIZE}")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(file_name, line, (), f"is not UTF-8 at byte {error.start}") from None
    node = _compose(decoded, file_name)
    lines: dict[Path, int] = {(): node.start_mark.line + 1}
    problems: list[monitor_pb2.PolicyProblem] = []
    value = _plain(node, (), lines, problems)
    if problems:
        raise PolicyProblems(file_name, problems[:MAX_PROBLEMS])
    try:
        model = Policy.model_validate(value)
    except ValidationError as error:
        raise PolicyProblems(file_name, _validation_problems(lines, error.errors(include_url=False))) from None
    wrong = [_problem(lines, path, message) for path, message in cross_checks(model)]
    if wrong:
        raise PolicyProblems(file_name, wrong)
    return PolicyText(model, decoded, hashlib.sha256(data).digest(), MappingProxyType(lines), file_name)


def _compose(text: str, file_name: str) -> yaml.Node:
    """The node tree of the only document. Checks the event stream first, which costs no more than the text is long."""
    try:
        for line, message in _forbidden(yaml.parse(text, Loader=yaml.SafeLoader)):
            raise _error(file_name, line, (), message)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(file_name, mark.line + 1 if mark else 0, (), error.problem or "is not YAML") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(file_name, line, (), f"has the character {error.character!r}, which YAML forbids") from None
    except yaml.YAMLError as error:
        raise _error(file_name, 0, (), str(error)) from None
    if node is None:
        raise _error(file_name, 1, (), "is empty")
    return node


def _forbidden(events: Iterable[yaml.Event]) -> Iterator[tuple[int, str]]:
    depth = nodes = documents = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 0
        tag = getattr(event, "tag", None)
        documents += isinstance(event, yaml.DocumentStartEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            yield line, "anchors and aliases are not allowed"
        elif tag is not None:
            yield line, f"tags are not allowed: {tag}"
        elif documents > 1:
            yield line, "has a second document"
        elif depth > MAX_DEPTH:
            yield line, f"is nested deeper than {MAX_DEPTH} levels"
        elif nodes > MAX_NODES:
            yield line, f"has more than {MAX_NODES} values"


def _plain(node: yaml.Node, path: Path, lines: dict[Path, int], problems: list[monitor_pb2.PolicyProblem]) -> object:
    """The node as plain Python; keys of mappings are their text."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines, problems)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_plain(item, (*path, index), lines, problems))
        return items
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, lines, problems)


def _mapping(
    node: yaml.MappingNode, path: Path, lines: dict[Path, int], problems: list[monitor_pb2.PolicyProblem]
) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(monitor_pb2.PolicyProblem(line=line, key=dotted(path), message="a key must be a word"))
            continue
        name = str(key.value)
        place = (*path, name)
        if name in result:
            message = f"appears twice, first on line {lines[place]}"
            problems.append(monitor_pb2.PolicyProblem(line=line, key=dotted(place), message=message))
            continue
        lines[place] = line
        result[name] = _plain(value, place, lines, problems)
    return result


def _scalar(
    node: yaml.ScalarNode, path: Path, lines: Mapping[Path, int], problems: list[monitor_pb2.PolicyProblem]
) -> object:
    kind = _SCALAR_TAGS.get(node.tag, str)
    if kind is int:
        try:
            return int(node.value.replace("_", ""), 0)
        except ValueError:
            problems.append(_problem(lines, path, f"'{node.value[:64]}' is no decimal or 0x number"))
            return 0
    if kind is bool:
        if node.value not in ("true", "false"):
            problems.append(_problem(lines, path, f"write true or false, or quote '{node.value}'"))
        return node.value == "true"
    return None if kind is type(None) else node.value


def _validation_problems(lines: Mapping[Path, int], details: Iterable[ErrorDetails]) -> list[monitor_pb2.PolicyProblem]:
    return [_problem(lines, detail["loc"], _message(detail)) for detail in details][:MAX_PROBLEMS]


def _message(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is missing"
    if kind in ("model_type", "dict_type"):
        return "must be a mapping"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return message[:1].lower() + message[1:] if message.startswith(("Must", "Input")) else message


def _problem(lines: Mapping[Path, int], path: Path, message: str) -> monitor_pb2.PolicyProblem:
    """The line is that of the path, or of its nearest ancestor in the text."""
    known = path
    while known not in lines and known:
        known = known[:-1]
    # Paths of pydantic say "[key]" after a mapping's key that is itself at fault.
    shown = tuple(part for part in path if part != "[key]")
    return monitor_pb2.PolicyProblem(line=lines.get(known, 1), key=dotted(shown), message=message)


def _error(file_name: str, line: int, path: Path, message: str) -> PolicyProblems:
    problem = monitor_pb2.PolicyProblem(line=line, key=dotted(path), message=message)
    return PolicyProblems(file_name, [problem])
