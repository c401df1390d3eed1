"""What our layers and nets are compared with: the same work by others, in equal layout and dtype, each at its best.

`layer_providers` and `net_providers` list them for a device; one that cannot run there says why. A provider's
`prepare` binds it to tensors (and compiles, folds, captures: whatever need be done but once), and gives `run`, which
does the work once and returns its result. `benchmarks.runs` compares that with float64: before it is right, it is not
timed. Whoever prepares and times does so within `timing.cudnn_benchmark`, from which all gain.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastunet
from fastunet import dispatch
from fastunet.losses import BCEDiceLoss
from fastunet.reference import functional as reference
from fastunet.testing import parity

from . import cudnn_graph, runtimes
from .cases import Layer
from .results import Unavailable

Run = Callable[[], Any]
# What torch.compile makes of a net, by the providers' names, and its mode.
COMPILED_NETS = {
    "compile": "default",
    "compile max-autotune": "max-autotune-no-cudagraphs",
    "compile CUDA graphs": "max-autotune",
    "compile freezing": "freezing",
}
# The names under which ours are listed: under the backend in force, and with the Triton kernels forced.
OURS, OURS_TRITON, OURS_FROZEN = "fastunet", "fastunet triton", "fastunet freeze"


@dataclass(frozen=True)
class Provider:
    """One way of doing the work. layout: "NCHW" or "NHWC"; dtype: of the products, as "bfloat16".

    prepare: of a layer (inputs: dict[str, Tensor]) -> run, with its result; of a net (model: fastunet.UNet, x, target
    or None) -> run, with the outputs or, of one training step, the loss before it. May raise `Unavailable` where the
    reason lies in the work itself. unavailable: why it cannot run here at all, "" where it can.
    """

    name: str
    layout: str
    dtype: str
    prepare: Callable[..., Any]
    unavailable: str = ""

    @property
    def compiles(self) -> bool:
        """Whether it is what torch.compile makes."""
        return self.name.startswith("compile")


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def our_backends(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(name, backend, unsupported) of ours: as the backend in force has it, and Triton unless that forces it."""
    in_force, unsupported = dispatch.selected_backend(), dispatch.triton_unsupported(device, dtype) or ""
    ours = [(OURS, in_force, unsupported if in_force == "triton" else "")]
    return ours if in_force == "triton" else [*ours, (OURS_TRITON, "triton", unsupported)]


def _keeps_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ours is at its best with weights in float32, under autocast: they are folded before they are rounded."""
    return device.type == "cpu" and dtype == torch.bfloat16


def layer_providers(
    layer: Layer, device: torch.device, dtype: torch.dtype, *, thorough: bool = False
) -> list[Provider]:
    """Of one layer's forward pass on tensors of that dtype, as `runs.device_inputs` makes them.

    Each has the layer's shape: prepare one, and other sets of inputs cost nothing more. thorough: also, on a CPU, what
    takes minutes to prepare.
    """
    composition, kind = getattr(reference, layer.op), dtype_name(dtype)
    library = "cudnn" if device.type == "cuda" else "onednn"
    providers = []
    for name, backend, unsupported in our_backends(device, dtype):
        prepare = functools.partial(_our_layer, layer.op, backend, _keeps_float32(device, dtype))
        providers.append(Provider(name, "NHWC", kind, prepare, unsupported))

    def add(name: str, function: Callable[..., Any], unsupported: str = "", layout: str = "NHWC") -> None:
        providers.append(Provider(name, layout, kind, functools.partial(_bound, function, layout), unsupported))

    add(f"{library} eager", composition)
    add(f"{library} eager NCHW", composition, layout="NCHW")
    for name, mode in (("compile", "default"), ("compile max-autotune", "max-autotune-no-cudagraphs")):
        add(name, compiled(composition, mode), compile_unsupported(device, mode, thorough=thorough))
    unsupported = cudnn_graph.unsupported(device, dtype)
    if "conv_transpose" in layer.op:
        unsupported = unsupported or "the graph is of a convolution, this is a transposed one"
    add("cudnn graph", _conv_graph(layer, device, dtype), unsupported)
    return providers


def _our_layer(op: str, backend: str, keeps_float32: bool, inputs: dict[str, Tensor]) -> Run:
    if keeps_float32:
        inputs = {name: t.float() if "weight" in name or "bias" in name else t for name, t in inputs.items()}

    def run() -> Any:
        with torch.no_grad(), fastunet.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=keeps_float32):
            return parity.run_op(op, inputs, {}, {})

    return run


def _bound(function: Callable[..., Any], layout: str, inputs: dict[str, Tensor]) -> Run:
    arguments = [*inputs.values()]
    if layout == "NCHW":
        # .contiguous() would leave a 1x1 kernel its strides, and torch then choose NHWC by them.
        arguments = [t.clone(memory_format=torch.contiguous_format) for t in arguments]

    def run() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return run


def _conv_graph(layer: Layer, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The layer by cuDNN's graph, which has neither the concatenation before it nor the pooling after it."""
    n, _, h, w = next(iter(layer.inputs.values()))
    x_shape = (n, sum(shape[1] for shape in layer.inputs.values()), h, w)
    relu, pool = layer.op.endswith(("relu", "relu_pool")), layer.op.endswith("_pool")

    @functools.cache
    def conv() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return cudnn_graph.conv(x_shape, layer.shapes["weight"], dtype, device, relu=relu)

    def function(*arguments: Tensor) -> Any:
        *images, weight, bias = arguments
        y = conv()(images[0] if len(images) == 1 else torch.cat(images, dim=1), weight, bias)
        return (y, reference.max_pool2x2(y)) if pool else y

    return function


# --- whole nets ---


@dataclass(frozen=True)
class _Form:
    """How a net is run. backend: of our ops, None for plain torch modules. mode: torch.compile's, None for eager.

    amp: under autocast to dtype, with float32 weights; else weights and images are of that dtype. is_apart: ours
    without what can be left out, outputs recomputed and upsampling folded into the convolution after it. is_frozen:
    ours by `fastunet.freeze`.
    """

    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last
    amp: bool = False
    backend: str | None = None
    mode: str | None = None
    is_folded: bool = False
    is_captured: bool = False
    is_apart: bool = False
    is_frozen: bool = False

    def arguments(self, *tensors: Tensor) -> list[Tensor]:
        """Images and targets in this form."""
        dtype = torch.float32 if self.amp else self.dtype
        return [t.to(dtype=dtype, memory_format=self.layout) for t in tensors]

    def net(self, model: fastunet.UNet) -> nn.Module:
        """A copy of the model in this form, in the model's mode."""
        net: Any = copy.deepcopy(model) if self.backend else model.to_reference()
        if self.is_folded:
            fold(net)
        for up in net.ups if self.is_apart else ():
            up.folds_upsampling = False
        net = net.to(dtype=torch.float32 if self.amp else self.dtype, memory_format=self.layout)
        return fastunet.freeze(net, dtype=self.dtype) if self.is_frozen else net

    def autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.dtype) if self.amp and not self.is_frozen else nullcontext()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What holds while it runs."""
        backend = fastunet.backend(self.backend) if self.backend else nullcontext()
        with backend, fastunet.recomputing(False) if self.is_apart else nullcontext():
            yield


def net_providers(
    device: torch.device, dtype: torch.dtype, *, training: bool, thorough: bool = False
) -> list[Provider]:
    """Of a whole net: one inference, or one training step (forward, BCE and Dice, backward, AdamW) under autocast.

    In 16 bits, inference has weights of that dtype, but for "eager channels_last AMP", which is what people write, and
    on a CPU for ours; "eager" is float32, what they run without it. The fastunet ones have the ops' backend that is in
    force here.
    thorough: also, on a CPU, what takes minutes to prepare.
    """
    amp = training and dtype != torch.float32
    plain = functools.partial(_Form, dtype, amp=amp)
    ours = functools.partial(_Form, dtype, amp=amp or _keeps_float32(device, dtype))
    found: list[Provider] = []

    def add(name: str, form: _Form, unavailable: str = "") -> None:
        layout = "NHWC" if form.layout == torch.channels_last else "NCHW"
        prepare = functools.partial(_training_step if training else _inference, form)
        found.append(Provider(name, layout, dtype_name(form.dtype), prepare, unavailable))

    backends = our_backends(device, dtype)
    for name, backend, unsupported in backends:
        add(name, ours(backend=backend), unsupported)
    name, backend, unsupported = backends[0]
    if backend == "triton":
        what = "outputs kept" if training else "upsampling apart"
        add(f"{name}, {what}", ours(backend=backend, is_apart=True), unsupported)
    if not training:
        freezes = dispatch.prepares_nets(torch.empty(1, device=device), dtype, [])
        add(OURS_FROZEN, ours(backend=backend, is_frozen=True), "" if freezes else "freezing is the CPU's, by oneDNN")
        add(f"{name} CUDA graph", plain(backend=backend, is_captured=True), unsupported or no_cuda(device))
    add("eager", _Form(torch.float32, torch.contiguous_format))
    if dtype == torch.float32 or not training:
        add("eager channels_last", plain())
    if dtype != torch.float32:
        add("eager channels_last AMP", _Form(dtype, amp=True))
    if not training:
        add("eager folded", plain(is_folded=True))
    for name, mode in COMPILED_NETS.items():
        if mode != "freezing" or not training:
            add(name, plain(mode=mode), compile_unsupported(device, mode, thorough=thorough))
    for name in () if training else runtimes.NAMES:
        prepare = functools.partial(runtimes.prepare, name, dtype)
        unsupported = runtimes.unavailable(name, device, dtype)
        found.append(Provider(name, "NCHW", dtype_name(dtype), prepare, unsupported))
    return found


def fold(net: nn.Module) -> None:
    """Put each BatchNorm of a plain net, in eval mode, into the convolution before it. Unavailable if there is none."""
    folded = 0
    for sequence in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i, (conv, norm) in enumerate(itertools.pairwise(list(sequence))):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i], sequence[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
                folded += 1
    if not folded:
        raise Unavailable("the net has no batch norm to fold")


def _inference(form: _Form, model: fastunet.UNet, x: Tensor, target: Tensor | None = None) -> Run:
    net = form.net(copy.deepcopy(model).eval())
    (image,) = form.arguments(x)

    def forward(image: Tensor) -> Tensor:
        with form.autocast(x.device):
            return net(image)

    call = compiled(forward, form.mode)

    def run() -> Tensor:
        with torch.no_grad(), form.scope():
            return call(image)

    return capture(run) if form.is_captured else run


def capture(run: Run, cuda: Any = torch.cuda) -> Run:
    """The run as a CUDA graph, on tensors that stay where they are; its result is overwritten by the next replay."""
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):  # Compiles, chooses algorithms and fills the allocator: none of it may be captured.
        for _ in range(3):
            run()
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def bce_dice(logits: Tensor, target: Tensor) -> Tensor:
    """What `fastunet.losses.BCEDiceLoss` computes, as people write it: a dozen passes over images of float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p, dims = logits.sigmoid(), (2, 3)
    overlap, sizes = (p * target).sum(dims), p.sum(dims) + target.sum(dims)
    dice = 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


def _training_step(form: _Form, model: fastunet.UNet, x: Tensor, target: Tensor) -> Run:
    net = form.net(copy.deepcopy(model).train())
    loss = BCEDiceLoss() if form.backend else bce_dice
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=x.is_cuda)
    scaler = torch.amp.GradScaler(x.device.type, enabled=form.dtype == torch.float16)
    image, truth = form.arguments(x, target)

    def forward(image: Tensor, truth: Tensor) -> Tensor:
        with form.autocast(x.device):
            logits = net(image)
        return loss(logits, truth)

    call = compiled(forward, form.mode)

    def run() -> Tensor:
        with form.scope():
            optimizer.zero_grad()
            value = call(image, truth)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        return value.detach()

    return run


# --- torch.compile: once for each function, for the shapes of its calls, in one graph or not at all ---


def no_cuda(device: torch.device) -> str:
    """Why there are no CUDA graphs on that device, or ""."""
    return "" if device.type == "cuda" else f"CUDA graphs need CUDA, the device is {device.type}"


def compile_unsupported(device: torch.device, mode: str, *, thorough: bool) -> str:
    """Why torch.compile cannot run in that mode on that device, or "". thorough: let it take minutes on a CPU."""
    if device.type != "cuda":
        if mode == "max-autotune":
            return no_cuda(device)
        if mode == "max-autotune-no-cudagraphs" and not thorough:
            return "max-autotune takes minutes on a CPU, and was not asked for"
        compiler = os.environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
    if mode == "freezing":
        return "freezing is the CPU's form of what CUDA graphs and max-autotune are on a GPU"
    return dispatch.triton_unsupported(device, torch.float32) or ""


def compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """The function compiled by inductor, at its first call, for exactly the shapes of that call; itself without a mode.

    mode: one of torch.compile's, "max-autotune" for tensors that stay where they are; or "freezing": the weights are
    constants, which inductor folds and lays out anew. Raises at a call that torch.compile would leave uncompiled in
    part or, after too many compilations, entirely.
    """
    if mode is None:
        return function
    target, freezes, captures = own_code(function), mode == "freezing", mode == "max-autotune"
    optimized: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal optimized
        if captures:
            torch.compiler.cudagraph_mark_step_begin()  # The outputs of the call before may be overwritten.
        if optimized is not None:
            return optimized(*arguments)
        for argument in arguments if captures else ():
            torch._dynamo.mark_static_address(argument)  # Else each call would copy it to where the graph reads.
        optimized = torch.compile(target, mode=None if freezes else mode, fullgraph=True, dynamic=False)
        # Only the compilation looks at the setting, and other providers are to compile without it.
        with torch._inductor.config.patch(freezing=freezes):
            return optimized(*arguments)

    return call


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls it, with a code object of its own.

    torch.compile counts compilations by code object, and after eight leaves it uncompiled: functions made by the same
    `def` would use them up together.
    """

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
