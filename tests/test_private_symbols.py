"""Private names of torch are in `fastunet.torch_private` alone, and each is in the torch installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fastunet import torch_private

FOLDER = Path(__file__).parents[1] / "fastunet"
FILES = {path: ast.parse(path.read_text()) for path in FOLDER.rglob("*.py")}
# Of named tuples, whose documented methods begin so, and accelerate's.
NOT_TORCHS = {"_asdict", "_fields", "_replace", "_reset_state"}
OPERATORS = ("torch.ops.", "aten.")  # They are named in strings of a registry, not by attributes of Python's.


def names_defined() -> set[str]:
    """What the package itself calls so: definitions, assignments, attributes of self."""
    nodes = [node for tree in FILES.values() for node in ast.walk(tree)]
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return found | {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def names_used(tree: ast.AST) -> Iterator[str]:
    """Modules and names that are imported from elsewhere, attributes, and those that getattr and hasattr name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("fastunet"):
            yield from (*str(node.module).split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute) and not ast.unparse(node).startswith(OPERATORS):
            yield node.attr
        elif is_look_up(node) and not ast.unparse(node.args[0]).startswith(OPERATORS):
            yield node.args[1].value


def is_look_up(node: ast.AST) -> bool:
    """Whether it is getattr or hasattr of a name that is known."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
    return is_call and isinstance(node.args[1], ast.Constant)


def test_private_names_are_in_one_module() -> None:
    known = names_defined() | NOT_TORCHS
    found = {
        f"{path.relative_to(FOLDER)}: {name}"
        for path, tree in FILES.items()
        for name in names_used(tree)
        if name.startswith("_") and not name.startswith("__") and name not in known
    }
    assert {line for line in found if not line.startswith("torch_private.py:")} == set()


def test_each_name_that_has_a_fallback_is_in_this_torch() -> None:
    for node in ast.walk(FILES[FOLDER / "torch_private.py"]):
        if is_look_up(node) and ast.unparse(node.args[0]) != "model":
            assert hasattr(eval(ast.unparse(node.args[0]), vars(torch_private)), node.args[1].value), ast.unparse(node)
