"""Putting fastunet's ops into a graph, in the place of the patterns that they compute."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastunet.compiler.fx_nodes import arguments, has_effect, is_image, name_of, value_of
from fastunet.compiler.patterns import Pattern, pair, slope_of, stride_of
from fastunet.cpu import folding
from fastunet.dispatch import STRIDE2
from fastunet.ops.conv3x3 import NAMES
from fastunet.ops.interpolation import MODES
from fastunet.ops.interpolation import NAME as INTERPOLATE
from fastunet.ops.registration import Op, memory_format, op_named

_ELEMENTWISE = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
)
# Marks the nodes that bring an op's images into channels_last.
_OWN = "fastunet"
_IMAGES = ("x", "up", "skip", "low")


def replace(graph_module: GraphModule, patterns: Sequence[Pattern]) -> None:
    """Compute each pattern by its op, in channels_last; what is not part of a pattern gets the strides it had."""
    made: set[Node] = set()
    for pattern in patterns:
        made |= _replace_one(graph_module.graph, pattern)
    _restore_strides(graph_module.graph, made)
    graph_module.graph.lint()
    graph_module.recompile()


def _replace_one(graph: Any, pattern: Pattern) -> set[Node]:
    """Return the nodes that stand for the pattern's results."""
    result, removed = pattern.result, [node for node in graph.nodes if node in pattern.nodes]
    with graph.inserting_before(result):
        op, given = _arguments(graph, pattern)
        for name in _IMAGES:
            if given.get(name) is not None:
                # Unlike `contiguous`, `to` gives an image of one channel the strides of channels_last.
                given[name] = made = graph.call_method("to", (given[name],), {"memory_format": torch.channels_last})
                made.meta[_OWN] = True
        call = graph.call_function(op.overload, tuple(op.arguments(**given)))
        call.meta.update({key: result.meta[key] for key in ("nn_module_stack", "stack_trace") if key in result.meta})
        results = {result: call if op.results == 1 else graph.call_function(operator.getitem, (call, 0))}
        if pattern.pool is not None:
            results[pattern.pool] = graph.call_function(operator.getitem, (call, 1))
        if pattern.norm is not None:
            _shift_running_mean(graph, pattern)
    for old, new in results.items():
        new.meta["example_value"] = value_of(old)
        old.replace_all_uses_with(new)
    for node in reversed(removed):
        graph.erase_node(node)
    return {*results.values()}


# --- arguments of the ops ---


def _arguments(graph: Any, pattern: Pattern) -> tuple[Op, dict[str, Any]]:
    """Return the pattern's op, and its arguments by name."""
    anchor, pool = arguments(pattern.anchor), pattern.pool is not None
    x, up = arguments(pattern.cat)["tensors"] if pattern.cat is not None else (anchor["input"], None)
    skip = up if pattern.up_first else x
    activation = None if pattern.head_activation is None else name_of(pattern.head_activation)
    # All that any op may take: the same by several names.
    given = {"x": x, "skip": skip, "up": up, "weight": anchor.get("weight"), "bias": anchor.get("bias"), "pool": pool}
    given |= {"slope": slope_of(pattern.activation), "stride": stride_of(pattern.anchor)}
    given |= {"activation": activation, "sigmoid": activation is not None}
    given |= {"gamma": None, "eps": 0.0, **_norm(graph, pattern)}
    given |= {"mean": given.get("running_mean"), "variance": given.get("running_var")}
    if pattern.head is not None:
        head = arguments(pattern.head)
        given |= {"head_weight": head["weight"], "head_bias": head["bias"]}
    if pattern.up is not None:
        of_up = arguments(pattern.up)  # An interpolation has no parameters.
        given |= {"low": of_up["input"], "up_weight": of_up.get("weight"), "up_bias": of_up.get("bias")}
        given["up_first"] = pattern.up_first
    name = str(pattern.op).removesuffix(STRIDE2)
    op = op_named("conv3x3" if name in NAMES.values() else name)
    return op, {name: given[name] for name in op.arguments._fields if name in given}


def _norm(graph: Any, pattern: Pattern) -> dict[str, Any]:
    """Return the norm among conv3x3's arguments, with the convolution's bias carried over to the norm's."""
    if pattern.norm is None:
        return {}
    norm, bias = arguments(pattern.norm), arguments(pattern.anchor)["bias"]
    if name_of(pattern.norm) == "instance_norm":
        gamma, beta = _with_idle_bias(graph, norm, bias)
        return {"norm": "instance", "gamma": gamma, "bias": beta, "eps": norm["eps"]}
    gamma, beta = norm["weight"], norm["bias"]
    if bias is not None and not norm["training"]:
        moved = (bias, gamma, beta, norm["running_mean"], norm["running_var"], norm["eps"])
        gamma, beta = _pair(graph, graph.call_function(folding.move_bias_after_norm, moved))
    elif bias is not None:
        gamma, beta = _with_idle_bias(graph, norm, bias)
    same = {name: norm[name] for name in ("running_mean", "running_var", "training", "momentum", "eps")}
    return {"norm": "batch", "gamma": gamma, "bias": beta, **same}


def _with_idle_bias(graph: Any, norm: dict[str, Any], bias: Node | None) -> tuple[Any, Any]:
    """gamma and beta of a norm by the batch's own statistics, which take the convolution's bias away again: what is
    left of it is its gradient, of zeros.
    """
    gamma, beta = norm["weight"], norm["bias"]
    if bias is None or not value_of(bias).requires_grad:
        return gamma, beta
    return _pair(graph, graph.call_function(folding.keep_idle_bias, (bias, gamma, beta)))


def _pair(graph: Any, node: Node) -> tuple[Node, Node]:
    return graph.call_function(operator.getitem, (node, 0)), graph.call_function(operator.getitem, (node, 1))


def _shift_running_mean(graph: Any, pattern: Pattern) -> None:
    """Move the running mean by the convolution's bias, without which the op computes it."""
    norm, bias = arguments(pattern.norm), arguments(pattern.anchor)["bias"]  # type: ignore[arg-type]
    if bias is None or not norm.get("training") or norm["running_mean"] is None:
        return
    detached = graph.call_method("detach", (bias,))
    graph.call_method("add_", (norm["running_mean"], detached), {"alpha": norm["momentum"]})


# --- what inductor cannot do, or only slowly ---


def keep_interpolations(graph_module: GraphModule) -> None:
    """Have ATen upsample on the CPU where a gradient is due, which inductor takes apart into a scatter of additions."""
    kept = []
    for node in graph_module.graph.nodes:
        if name_of(node) != "interpolate" or not (is_image(node) and value_of(node).requires_grad):
            continue
        given, result = arguments(node), value_of(node)
        image = value_of(given["input"])
        sizes, how = [*image.shape[2:], *result.shape[2:]], given["mode"]
        factors = () if given["scale_factor"] is None else pair(given["scale_factor"])
        is_known = all(isinstance(each, int | float) for each in (*sizes, *factors)) and given["antialias"] is False
        # By a factor that is no whole number, pixels may lie elsewhere than the sizes say.
        is_whole = is_known and (not factors or sizes[2:] == [f * n for f, n in zip(factors, sizes[:2], strict=True)])
        if is_whole and how in MODES and result.device.type == "cpu" and result.dtype == image.dtype:
            node.op, node.target = "call_function", op_named(INTERPOLATE).overload
            node.args, node.kwargs = (given["input"], *sizes[2:], how, bool(given["align_corners"])), {}
            kept.append(node)
    if kept:
        graph_module.recompile()


def replace_replicate_pads(graph_module: GraphModule) -> None:
    """Pad images by copies of their edges, in place of F.pad's "replicate" mode: of its backward inductor expects other
    strides than it gets, and raises at run time (seen with torch 2.13, where a convolution is before it); and where no
    width is but 0, as is usual, it still looks up each pixel's place.
    """
    pads = []
    for node in graph_module.graph.nodes:
        if name_of(node) == "pad" and arguments(node)["mode"] == "replicate" and is_image(node):
            given = arguments(node)
            widths_fit = len(given["pad"]) == 4 and all(isinstance(w, int) and w >= 0 for w in given["pad"])
            if widths_fit:
                node.op, node.target = "call_function", replicate_pad
                node.args, node.kwargs = (given["input"], given["pad"]), {}
                pads.append(node)
    if pads:
        graph_module.recompile()


def replicate_pad(x: Tensor, widths: Sequence[int]) -> Tensor:
    """Compute F.pad(x, [left, right, above, below], "replicate") of x [N, C, H, W], where no width is negative."""
    left, right, above, below = widths
    y = x
    for axis, before, after in ((3, left, right), (2, above, below)):
        first, last = y.narrow(axis, 0, 1), y.narrow(axis, y.shape[axis] - 1, 1)
        # Often none is needed, as of sizes that halve and double again: then nothing is copied, nor a gradient cut.
        parts = [(first, before), (y, 1), (last, after)]
        edges = [part if width == 1 else part.repeat_interleave(width, axis) for part, width in parts if width]
        y = torch.cat(edges, dim=axis) if len(edges) > 1 else y
    return y.clone(memory_format=memory_format(x)) if y is x else y


# --- memory format ---


def _restore_strides(graph: Any, made: set[Node]) -> None:
    """Give back the strides they had before to the users of the ops' results that could tell a difference.

    A user gets a copy. Where something is changed in place from then on, which might have to show in both, the results
    themselves are brought into their former strides, once and for all.
    """
    copies = _copies(graph, made)
    if _something_changes_from(graph, [user for user, _ in copies if user.op != "output"]):
        for node in filter(_was_contiguous, made):
            users = list(node.users)
            with graph.inserting_after(node):
                restored = graph.call_method("contiguous", (node,))
            restored.meta["example_value"] = value_of(node)
            for user in users:
                user.replace_input_with(node, restored)
        return
    for user, source in copies:
        with graph.inserting_before(user):
            restored = graph.call_method("contiguous", (source,))
            restored.meta["example_value"] = value_of(source)
            user.replace_input_with(source, restored)


def _copies(graph: Any, made: set[Node]) -> list[tuple[Node, Node]]:
    """Return (user, result) wherever what was contiguous, and is channels_last now, is used by what could tell."""
    in_channels_last = {node for node in made if _was_contiguous(node)}
    found = []
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in in_channels_last]
        if not sources or _OWN in node.meta:
            continue
        if not _follows_format(node):
            found += [(node, source) for source in sources]
        elif _was_contiguous(node):
            in_channels_last.add(node)
    return found


def _something_changes_from(graph: Any, nodes: Sequence[Node]) -> bool:
    """Whether anything but the graph's own inputs may be changed in place by one of the nodes, or after the first."""
    order = list(graph.nodes)
    return any(
        has_effect(node) and not _is_ours(node) and not (node.args and getattr(node.args[0], "op", "") == "placeholder")
        for node in order[min(map(order.index, nodes), default=len(order)) :]
        if node.op != "output"
    )


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "fastunet"


def _follows_format(node: Node) -> bool:
    tensors = [value for value in map(value_of, node.args) if isinstance(value, Tensor)]
    elementwise = node.target in _ELEMENTWISE and all(t.dim() == 4 for t in tensors)
    # Functions of images answer in the memory format they get.
    return _is_ours(node) or elementwise or (name_of(node) != "" and not name_of(node).endswith(("1d", "3d")))


def _was_contiguous(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_contiguous()
