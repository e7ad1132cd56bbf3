"""What is wrong with a policy, each with its place in the text."""

from __future__ import annotations

from collections.abc import Iterable

from vtlab.errors import BadPolicy
from vtlab.v1 import monitor_pb2


class PolicyProblems(BadPolicy):
    """A policy cannot be parsed or resolved; the first problem is the error, `problems` has all of them."""

    def __init__(self, file_name: str, problems: Iterable[monitor_pb2.PolicyProblem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        first = self.problems[0]
        super().__init__(file_name, first.message, line=first.line, key=first.key)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.subject, self.problems)
