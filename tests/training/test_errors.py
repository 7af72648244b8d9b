"""Every error that a user can fix says how."""

import ast
from collections.abc import Iterator

from tests.helpers.worlds import CHECKOUT
from tests.repository.test_architecture import modules

ERRORS = {"ConfigError", "DataError", "TopologyError", "DivergedError", "NoProgressError"}

PASSED_ON = ("fix", "refused", "str(error)", "{error}", "explain(error)", "_not_there(")
"""Parts of an expression that give the fix: a function or variable for it, or the text of another error."""


def messages() -> Iterator[tuple[str, str]]:
    """Yield place and expression of each message of these errors."""
    for path in modules().values():
        for node in ast.walk(ast.parse((CHECKOUT / path).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                yield f"{path}:{node.lineno}", ast.unparse(node.args[0])


def test_every_message_has_a_fix() -> None:
    found = list(messages())
    assert len(found) > 60
    assert [place for place, text in found if "Fix" not in text and not any(part in text for part in PASSED_ON)] == []
