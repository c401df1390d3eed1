"""What in a graph of torch functions is exactly one of fastunet's ops, and why the rest is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastunet import dispatch
from fastunet.compiler.fx_nodes import Order, arguments, has_effect, is_image, layer_of, name_of, only_user, value_of
from fastunet.compiler.gains import gains_little, leave_what_spares_little, take_what_leaves

WITH_UPSAMPLING = "conv_transpose2x2_concat_conv3x3_relu"
WITH_HEAD = "conv3x3_relu_conv1x1"
_ANCHORS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("max_pool2d", "interpolate"),
)
# By kind and kernel, the geometry that an op stands for.
_PLAIN: dict[str, Any] = {"dilation": (1, 1), "groups": 1}
_TWICE: dict[str, Any] = {"stride": (2, 2), "padding": (0, 0)}
_GEOMETRY: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {
    ("conv2d", (3, 3)): {"stride": (1, 1), "padding": (1, 1), **_PLAIN},  # or stride (2, 2)
    ("conv2d", (1, 1)): {"stride": (1, 1), "padding": (0, 0), **_PLAIN},
    ("conv_transpose2d", (2, 2)): {**_TWICE, "output_padding": (0, 0), **_PLAIN},
    ("max_pool2d", (2, 2)): {**_TWICE, "dilation": (1, 1), "ceil_mode": False, "return_indices": False},
}


@dataclass
class Pattern:
    """Nodes that belong together, and the op that computes them in one step."""

    anchor: Node  # the convolution, pooling or upsampling that it was found by
    result: Node  # the last of its nodes but the pool, what the op's first result stands for
    op: str | None = None  # None where none computes exactly this
    reason: str = ""  # why there is no op, or why `runs_on` runs
    runs_on: str | None = None  # "triton", "onednn" or "aten", what the op would run on here
    interpolation: Node | None = None  # an upsampling that stays where it is, but whose result is not concatenated
    cat: Node | None = None  # this and the next seven: the other nodes it takes in, where it has them
    norm: Node | None = None
    activation: Node | None = None
    pool: Node | None = None
    up: Node | None = None
    up_first: bool = False  # whether what `up` gives is the first of what `cat` joins
    pad: Node | None = None
    head: Node | None = None
    head_activation: Node | None = None
    idle: list[Node] = field(default_factory=list)  # dropouts that do nothing
    is_replaced: bool = False  # whether the op is to take the nodes' place
    layer: str = ""  # the path of the module that holds the anchor
    description: str = ""  # what it computes: "conv3x3 + batch_norm + relu"

    @property
    def parts(self) -> list[Node]:
        """Return what it computes, in the order of a description."""
        parts = (self.up, self.pad, self.cat, self.anchor, self.norm, self.activation, self.pool, self.head)
        return [node for node in (*parts, self.head_activation) if node is not None]

    @property
    def nodes(self) -> list[Node]:
        """Return all nodes it takes the place of."""
        return [*self.parts, *self.idle]


def find(
    graph_module: GraphModule, *, force: bool = False, device: torch.device | None = None, is_inner: bool = False
) -> list[Pattern]:
    """Return the patterns of a graph from Dynamo, in its order; not those of graphs within it.

    force: choose ops also where they would run on ATen, as does what they replace. device: answer as for a graph on
    that device. is_inner: what leaves it stays within another graph.
    Raises BackendError where the backend in force is "triton" and a kernel cannot run here.
    """
    search = _Search(graph_module, force, device, is_inner)
    for node in graph_module.graph.nodes:
        if name_of(node) in _ANCHORS and node not in search.covered:
            search.add(node)
    if not force:
        leave_what_spares_little(search.patterns)
        if not is_inner:
            take_what_leaves(search.patterns, device)
    return search.patterns


class _Search:
    def __init__(self, graph_module: GraphModule, force: bool, device: torch.device | None, is_inner: bool) -> None:
        self.order = Order(graph_module.graph.nodes)
        self.force, self.device, self.is_inner = force, device, is_inner
        self.patterns: list[Pattern] = []
        self.covered: set[Node] = set()

    def add(self, node: Node) -> None:
        pattern = Pattern(node, result=node)
        unsupported = _unsupported(node)
        if unsupported is not None:
            pattern.reason = unsupported
        elif name_of(node) == "max_pool2d":
            pattern.op = "max_pool2x2"
        elif name_of(node) == "conv_transpose2d":
            pattern.op = "conv_transpose2x2"
        elif _kernel(node) == (1, 1):
            pattern.op = "conv1x1"
            self._take_head_activation(pattern, node)
        else:
            self._grow(pattern)
        if pattern.op is not None:
            choice = self._choice(pattern.op, pattern)
            pattern.runs_on, pattern.reason = choice.implementation, choice.reason
            is_atens = choice.implementation == "aten"
            pattern.is_replaced = self.force or not (is_atens or gains_little(choice))
            if not pattern.is_replaced:
                why = "the op would run on ATen here" if is_atens else "inductor may be as fast, by fusion"
                pattern.reason = f"{why}: {choice.reason}"
        described = pattern.parts
        if pattern.interpolation is not None:
            described = [pattern.interpolation, *described]
            pattern.reason += "; the upsampling before it is left, and its result not concatenated"
        # While the graph still has the nodes.
        pattern.layer, pattern.description = layer_of(node), " + ".join(map(_described, described))
        self.patterns.append(pattern)
        self.covered.update(pattern.nodes)

    def _choice(self, op: Any, pattern: Pattern) -> dispatch.Choice:
        """Return what dispatch chooses for the anchor's image, in the dtype of its result, which is that autocast
        gives.
        """
        norm_trains = pattern.norm is not None and arguments(pattern.norm).get("training", False)
        weight = arguments(pattern.anchor).get("weight")
        result = value_of(pattern.anchor)
        with result.fake_mode:
            shape = value_of(arguments(pattern.anchor)["input"]).shape
            image = torch.empty(shape, dtype=result.dtype, device=self.device or result.device)
        training = norm_trains or _has_gradient(pattern)
        return dispatch.choose(op, image, None if weight is None else value_of(weight), training=training)

    def _take(self, pattern: Pattern, **nodes: Node) -> bool:
        """Let pattern have these nodes too, each in its role, if it can still be computed in one step."""
        if not self.order.is_quiet([*pattern.nodes, *nodes.values()]):
            return False
        for role, node in nodes.items():
            setattr(pattern, role, node)
            if role in ("norm", "activation", "head", "head_activation"):
                pattern.result = node
        return True

    def _grow(self, pattern: Pattern) -> None:
        """Take what follows a 3x3 convolution, what is concatenated before it, and what inference has around it."""
        strided = dispatch.STRIDE2 if stride_of(pattern.anchor) == 2 else ""
        pattern.op = "conv3x3_bias_relu" + strided
        self._take_norm(pattern, strided)
        user = self._take_idle(pattern)
        if user is not None and self._is_activation_of(pattern, user):
            self._take(pattern, activation=user)
        joined = arguments(pattern.anchor)["input"]
        if _is_plain_cat(joined) and only_user(joined) is not None and not self._changes(pattern, joined):
            self._take(pattern, cat=joined)
        if pattern.cat is not None:
            self._take_interpolation(pattern)
        norm = pattern.norm
        by_running = norm is not None and name_of(norm) == "batch_norm" and arguments(norm)["training"] is False
        is_foldable = not strided and not _has_gradient(pattern) and (norm is None or by_running)
        if is_foldable and (self._take_upsampling(pattern) or self._take_head(pattern)):
            return
        for user in pattern.result.users:
            if name_of(user) == "max_pool2d" and _unsupported(user) is None and self._take(pattern, pool=user):
                return

    def _is_activation_of(self, pattern: Pattern, node: Node) -> bool:
        """Whether an op may compute it: for its gradient it keeps the result, where torch keeps a leaky ReLU's argument
        unless it is in place.
        """
        slope = slope_of(node)
        is_kept = slope == 0 or has_effect(node) or not _has_gradient(pattern)
        return slope is not None and (is_kept or not self.order.is_changed(node))

    def _changes(self, pattern: Pattern, joined: Node) -> bool:
        """Whether what is joined is changed later on, which an op keeps for its gradient, where torch keeps a copy."""
        return _has_gradient(pattern) and any(map(self.order.is_changed, arguments(joined)["tensors"]))

    def _take_idle(self, pattern: Pattern) -> Node | None:
        """Take in dropouts that do nothing; what alone uses the result then."""
        user = only_user(pattern.result)
        while user is not None and _is_idle(user) and self.order.is_quiet([*pattern.nodes, user]):
            pattern.idle.append(user)
            pattern.result = user
            user = only_user(user)
        return user

    def _take_norm(self, pattern: Pattern, strided: str) -> None:
        user = self._take_idle(pattern)
        kind = None if user is None else _norm_kind(user)
        if user is None or kind is None:
            return
        if self.is_inner and arguments(user).get("training"):
            return  # Of a checkpointed region with statistics to move, inductor's partitioner loses the op's results.
        op = f"conv3x3_{kind}_relu{strided}"
        # Inference on the CPU folds batch norm away; instance norm it computes as ATen does, where another backend
        # makes one pass of it and of all that follows.
        is_better = kind != "instance_norm" or self._choice(op, pattern).implementation != "onednn"
        if (self.force or is_better) and self._take(pattern, norm=user):
            pattern.op = op

    def _take_interpolation(self, pattern: Pattern) -> None:
        """Name the upsampling by interpolation that gives one of the concatenated inputs, maybe padded: another backend
        computes it, and the op takes its result for one of its images.
        """
        assert pattern.cat is not None
        for node in arguments(pattern.cat)["tensors"]:
            source = arguments(node)["input"] if name_of(node) == "pad" else node
            if name_of(source) == "interpolate" and only_user(source) is not None and only_user(node) is not None:
                pattern.interpolation = source
                self.patterns = [found for found in self.patterns if found.anchor is not source]
                return

    def _take_upsampling(self, pattern: Pattern) -> bool:
        """Take what doubles one of the concatenated inputs, where one op computes it and the convolution."""
        if pattern.cat is None or not self._choice(WITH_UPSAMPLING, pattern).prepares:
            return False
        first, second = arguments(pattern.cat)["tensors"]
        for skip, joined, up_first in ((first, second, False), (second, first, True)):
            pad = joined if name_of(joined) == "pad" else None
            up = joined if pad is None else arguments(pad)["input"]
            nodes = {"up": up} if pad is None else {"up": up, "pad": pad}
            is_ops = _doubles_to_skip(up, pad, skip) and all(only_user(node) is not None for node in nodes.values())
            if is_ops and self._take(pattern, **nodes):
                self.patterns = [found for found in self.patterns if found.anchor is not up]
                pattern.op, pattern.up_first, pattern.interpolation = WITH_UPSAMPLING, up_first, None
                return True
        return False

    def _take_head(self, pattern: Pattern) -> bool:
        """Take the 1x1 convolution that alone uses the result."""
        head = only_user(pattern.result)
        if pattern.cat is not None or head is None or name_of(head) != "conv2d":
            return False
        if arguments(head)["input"] is not pattern.result or _unsupported(head) is not None or _kernel(head) != (1, 1):
            return False
        if self._choice(WITH_HEAD, pattern).implementation == "aten" and not self.force:
            return False
        if not self._take(pattern, head=head):
            return False
        pattern.op = WITH_HEAD
        self._take_head_activation(pattern, head)
        return True

    def _take_head_activation(self, pattern: Pattern, head: Node) -> None:
        user = only_user(head)
        if user is None or name_of(user) not in ("sigmoid", "softmax"):
            return
        of_channels = name_of(user) == "sigmoid" or (
            arguments(user)["dim"] in (1, -3) and arguments(user)["dtype"] is None and pattern.head is None
        )
        if of_channels:
            self._take(pattern, head_activation=user)


# --- single nodes ---


def _unsupported(node: Node) -> str | None:
    """Return why no op computes what this anchor calls, or None."""
    name, given = name_of(node), arguments(node)
    if name == "interpolate":
        return "upsampling by interpolation has no op, and no 3x3 convolution takes its result beside another image"
    if name.endswith(("1d", "3d")):
        volumes = f"{dispatch.VOLUMES}; " if name.endswith("3d") else ""
        return f"{name}: {volumes}the ops are for images [N, C, H, W]"
    if not is_image(node) or not is_image(given["input"]):
        value = value_of(node)
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        return f"expected floating-point images [N, C, H, W], got {got}"
    return (_weight_unsupported(node) if "weight" in given else None) or _geometry_unsupported(node)


def _weight_unsupported(node: Node) -> str | None:
    weight = arguments(node)["weight"]
    if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr"):
        return "its weight is computed (parametrised, pruned, or scaled), not a parameter"
    layers = {layer_of(user) for user in weight.users}
    uses = sum(name_of(user).startswith("conv") for user in weight.users)
    if uses > 1:
        return f"its weight is shared by {uses} convolutions ({', '.join(sorted(layers))})"
    return None


def _geometry_unsupported(node: Node) -> str | None:
    name, given, sides = name_of(node), arguments(node), _kernel(node)
    kernel, expected = "x".join(map(str, sides)), _GEOMETRY.get((name, sides))
    if expected is None:
        return f"{name} of {kernel}: the ops have 3x3, 1x1, transposed 2x2, and max-pooling of 2x2"
    actual = {key: pair(given[key]) if isinstance(like, tuple) else given[key] for key, like in expected.items()}
    if actual["padding"] == ("same", "same"):  # Of an odd kernel at stride 1, to which torch confines the word.
        actual["padding"] = expected["padding"]
    if name == "max_pool2d" and given["stride"] in (None, []):
        actual["stride"] = sides
    if (name, sides, actual["stride"]) == ("conv2d", (3, 3), (2, 2)):
        expected = {**expected, "stride": (2, 2)}
    wrong = [f"{key} {value} instead of {expected[key]}" for key, value in actual.items() if value != expected[key]]
    return f"{name} of {kernel} with {', '.join(wrong)}" if wrong else None


def _kernel(node: Node) -> tuple[int, ...]:
    given = arguments(node)
    return pair(given["kernel_size"]) if "kernel_size" in given else tuple(value_of(given["weight"]).shape[2:])


def pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, list | tuple):
        return (value[0], value[0]) if len(value) == 1 else tuple(value)
    return (value, value)


def _is_idle(node: Node) -> bool:
    return name_of(node) == "dropout" and (not arguments(node)["training"] or arguments(node)["p"] == 0)


def stride_of(anchor: Node) -> int:
    """Return the ops' `stride` argument for a 3x3 convolution whose geometry is one of theirs, 1 for anything else."""
    return int(pair(arguments(anchor)["stride"])[0]) if name_of(anchor) == "conv2d" else 1


def slope_of(activation: Node | None) -> float | None:
    """Return the ops' `slope` argument for an activation: 0.0 of a ReLU, its own of a LeakyReLU, else None."""
    if name_of(activation) == "relu":
        return 0.0
    if activation is None or name_of(activation) != "leaky_relu":
        return None
    slope = arguments(activation)["negative_slope"]
    return float(slope) if isinstance(slope, float | int) and slope >= 0 else None


def _norm_kind(node: Node) -> str | None:
    """ "batch_norm" or "instance_norm" where the node is what the op of that name computes."""
    kind = name_of(node)
    if kind not in ("batch_norm", "instance_norm") or not is_image(node):
        return None
    given = arguments(node)
    has_statistics = given["running_mean"] is not None and given["running_var"] is not None
    has_pair = (given["weight"] is None) == (given["bias"] is None)
    numbers = all(isinstance(given[key], float | int) for key in ("momentum", "eps"))
    if not (has_pair and numbers):
        return None
    if kind == "batch_norm":
        return kind if isinstance(given["training"], bool) and (given["training"] or has_statistics) else None
    return kind if given["use_input_stats"] is True and given["running_mean"] is None else None


def _is_plain_cat(node: Any) -> bool:
    """Whether it concatenates two images of one dtype along the channels."""
    if name_of(node) != "cat" or not is_image(node):
        return False
    tensors, dim = arguments(node)["tensors"], arguments(node)["dim"]
    return (
        dim in (1, -3)
        and len(tensors) == 2
        and all(is_image(t) for t in tensors)
        and value_of(tensors[0]).dtype == value_of(tensors[1]).dtype
    )


def _has_gradient(pattern: Pattern) -> bool:
    return value_of(pattern.result).requires_grad


def _doubles_to_skip(up: Any, pad: Node | None, skip: Any) -> bool:
    """Whether `up`, padded by at most a row below and a column on the right, doubles an image to skip's size."""
    is_transposed = name_of(up) == "conv_transpose2d" and _unsupported(up) is None
    if not (is_transposed or _repeats_pixels(up)):
        return False
    if pad is None:
        return True
    given = arguments(pad)
    low, large = value_of(arguments(up)["input"]).shape[2:], value_of(skip).shape[2:]
    zeros = given["mode"] == "constant" and given["value"] in (None, 0)
    widths = list(given["pad"])
    return (
        zeros
        and all(isinstance(size, int) for size in (*widths, *low, *large))
        and widths == [0, large[1] - 2 * low[1], 0, large[0] - 2 * low[0]]
        and all(width in (0, 1) for width in widths)
    )


def _repeats_pixels(node: Any) -> bool:
    """Whether it makes four of each pixel of an image. By a factor of 2.2 small images double as well, but not all of
    their pixels do.
    """
    if name_of(node) != "interpolate" or not is_image(node):
        return False
    given = arguments(node)
    sizes = [*value_of(given["input"]).shape[2:], *value_of(node).shape[2:]]
    if given["scale_factor"] is None:
        doubles = all(isinstance(size, int) for size in sizes) and sizes[2:] == [2 * size for size in sizes[:2]]
    else:
        doubles = pair(given["scale_factor"]) == (2, 2)
    return doubles and given["mode"] in ("nearest", "nearest-exact")


def _described(node: Node) -> str:
    name = name_of(node)
    if name in ("conv2d", "conv_transpose2d"):
        weight = value_of(arguments(node)["weight"])
        kernel = "x".join(str(s) for s in weight.shape[2:]) if isinstance(weight, Tensor) else ""
        stride = pair(arguments(node)["stride"]) if name == "conv2d" else (1, 1)
        by = "" if stride == (1, 1) else f" of stride {'x'.join(map(str, stride))}"
        return name.removesuffix("2d") + kernel + by
    return {"max_pool2d": "max_pool", "interpolate": "upsample"}.get(name, name)
