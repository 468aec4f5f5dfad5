"""Each reason that the services give is told in one place, and none is told that nobody gives."""

import ast
from collections.abc import Iterator
from pathlib import Path

from crashbus import reasons

ROOT = Path(__file__).parents[2]
POSITIONS = {"CaptureFailed": 0, "SourceLost": 0, "Final": 0, "Passing": 0, "Unfit": 1}


def given(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what stands where a reason does."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                if name in POSITIONS and len(args) > POSITIONS[name]:
                    yield args[POSITIONS[name]]
                yield from (one.value for one in keywords if one.arg == "reason")
            # reason, mend = …; and errors that stand in a table with what they mean
            case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id="reason"), _])], value=value):
                yield from pairs(value)
            case (
                ast.Assign(targets=[ast.Name(id="FINAL" | "PASSING")], value=value)
                | ast.AnnAssign(target=ast.Name(id="FINAL" | "PASSING"), value=ast.Dict() as value)
            ):
                yield from pairs(value)


def pairs(value: ast.expr) -> Iterator[ast.expr]:
    yield from (node.elts[0] for node in ast.walk(value) if isinstance(node, ast.Tuple))


def test_every_reason_that_is_given_is_told_and_no_other() -> None:
    found = {
        reason.value
        for folder in ("crashbus", "services")
        for path in (ROOT / folder).rglob("*.py")
        for reason in given(ast.parse(path.read_text()))
        if isinstance(reason, ast.Constant)
    }
    assert found == set(reasons.ALL)
