"""Reading the graphs of torch functions that Dynamo records: what a node calls, with which arguments, and what it
changes beside its result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

_REQUIRED = object()
_CONV = {"input": _REQUIRED, "weight": _REQUIRED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONV_TRANSPOSE = {
    "input": _REQUIRED,
    "weight": _REQUIRED,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "groups": 1,
    "dilation": 1,
}
_POOL = {
    "input": _REQUIRED,
    "kernel_size": _REQUIRED,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
_BATCH_NORM = {
    "input": _REQUIRED,
    "running_mean": _REQUIRED,
    "running_var": _REQUIRED,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
_INSTANCE_NORM = {
    "input": _REQUIRED,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "use_input_stats": True,
    "momentum": 0.1,
    "eps": 1e-5,
}
_DROPOUT = {"input": _REQUIRED, "p": 0.5, "training": True, "inplace": False}
_UNARY = {"input": _REQUIRED, "inplace": False}
_LEAKY = {"input": _REQUIRED, "negative_slope": 0.01, "inplace": False}
_SOFTMAX = {"input": _REQUIRED, "dim": None, "dtype": None}
_INTERPOLATE = {
    "input": _REQUIRED,
    "size": None,
    "scale_factor": None,
    "mode": "nearest",
    "align_corners": None,
    "recompute_scale_factor": None,
    "antialias": False,
}
_CAT = {"tensors": _REQUIRED, "dim": 0}
_PAD = {"input": _REQUIRED, "pad": _REQUIRED, "mode": "constant", "value": None}

# What a node may call -> (one name for it, its parameters with their defaults). Methods go by name.
_SIGNATURES: dict[Any, tuple[str, dict[str, Any]]] = {
    **{getattr(torch, name): (name, _CONV) for name in ("conv1d", "conv2d", "conv3d")},
    **{
        getattr(torch, name): (name, _CONV_TRANSPOSE)
        for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    },
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), ("max_pool2d", _POOL)),
    F.batch_norm: ("batch_norm", _BATCH_NORM),
    F.instance_norm: ("instance_norm", _INSTANCE_NORM),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), ("dropout", _DROPOUT)),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), ("relu", _UNARY)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", _LEAKY)),
    F.silu: ("silu", _UNARY),
    torch.prelu: ("prelu", {"input": _REQUIRED, "weight": _REQUIRED}),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), ("sigmoid", {"input": _REQUIRED})),
    F.softmax: ("softmax", {"input": _REQUIRED, "dim": None, "_stacklevel": 3, "dtype": None}),
    **dict.fromkeys((torch.softmax, "softmax"), ("softmax", _SOFTMAX)),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), ("cat", _CAT)),
    F.interpolate: ("interpolate", _INTERPOLATE),
    **dict.fromkeys((F.pad, torch._C._nn.pad), ("pad", _PAD)),
}
# x += y and its like.
_AUGMENTED = tuple(
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
)
# Calls after which the same functions mean something else.
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def name_of(node: object) -> str:
    """The function a node calls, by one name for all its spellings; "" if it is none of those known here, or called
    with more than the parameters known here (`out`).
    """
    if not isinstance(node, Node) or _key(node) not in _SIGNATURES:
        return ""
    name, parameters = _SIGNATURES[_key(node)]
    return name if all(key in parameters or (name, key) == ("cat", "axis") for key in node.kwargs) else ""


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a node whose `name_of` is known, by parameter, defaults filled in."""
    parameters = _SIGNATURES[_key(node)][1]
    given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    if "axis" in given:  # torch.cat's other name for it.
        given["dim"] = given.pop("axis")
    return {**parameters, **given}


def _key(node: Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def value_of(node: object) -> Any:
    """The fake tensor (or number) that stands for a node's result, None where Dynamo left none."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def is_image(node: object) -> bool:
    """Whether a node's result is an ordinary tensor [N, C, H, W] of a real floating dtype."""
    value = value_of(node)
    # What stands for a tensor within a transform of torch.func is no fake tensor itself.
    is_fake = isinstance(value, Tensor) and hasattr(value, "fake_mode")
    return is_fake and value.dim() == 4 and value.is_floating_point()


def only_user(node: Node) -> Node | None:
    """The node that alone uses this one's result, in one place."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def layer_of(node: Node) -> str:
    """The path of the module whose forward called it, from the model: "down1.conv"; "" in the model's own forward."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("].")[2]


class Order:
    """Where the nodes of a graph stand, and what happens between two of them."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = list(nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}

    def sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self._index.__getitem__)

    def is_quiet(self, nodes: Iterable[Node]) -> bool:
        """Whether the nodes can be computed in one step at the place of the last: nothing else from the first on
        changes a tensor or a mode, or touches the statistics they move.
        """
        members = set(nodes)
        inside = [self._index[node] for node in members]
        statistics = {s for node in members for s in _moved_statistics(node)}
        return not any(
            has_effect(node) or statistics.intersection(node.all_input_nodes)
            for node in self._nodes[min(inside) : max(inside)]
            if node not in members
        )


def _moved_statistics(node: Node) -> list[Node]:
    if name_of(node) != "batch_norm" or not arguments(node)["training"]:
        return []
    return [s for s in (arguments(node)[key] for key in ("running_mean", "running_var")) if isinstance(s, Node)]


def has_effect(node: Node) -> bool:
    """Whether a node may change anything but its own result. What is not known to be pure may."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") or name.startswith("__i")) and not _counts_batches(node)
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr")
    return (
        getattr(node.target, "__name__", "") in _MODES
        or isinstance(node.target, torch._ops.HigherOrderOperator)
        or _is_mutable(node.target)
        or is_in_place(node)
        or not node.users
    )


def _is_mutable(op: Any) -> bool:
    """Whether an op from torch.ops, in any of its overloads, changes an argument."""
    if isinstance(op, torch._ops.OpOverloadPacket):
        return any(getattr(op, name)._schema.is_mutable for name in op.overloads())
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def is_in_place(node: Node) -> bool:
    """Whether a function writes its result into its input, or into another argument."""
    name = getattr(node.target, "__name__", str(node.target))
    if name_of(node):
        return name.endswith("_") or bool(arguments(node).get("inplace"))
    return (
        node.target in _AUGMENTED
        or node.target is operator.setitem
        or name.endswith("_")
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
        or any(a is True for a in node.args)  # `inplace` by position, as far as one can tell.
    )


def _counts_batches(node: Node) -> bool:
    """num_batches_tracked.add_(1): no op of ours reads it."""
    value = value_of(node.args[0])
    return node.target == "add_" and isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0


def calls(graph_nodes: Iterable[Node], *names: str) -> list[Node]:
    """The nodes that call one of these functions."""
    return [node for node in graph_nodes if name_of(node) in names]
