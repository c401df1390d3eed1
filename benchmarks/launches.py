"""What there is to compile: the launches of every op, at sizes that lead to every configuration that can be chosen.

The ops make them themselves, of tensors of the CPU, as on a GPU of the target; each is recorded, and none runs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastunet.kernels import autotune, config_pixels, gpu
from fastunet.kernels.conv3x3 import config, config_hopper, config_search
from fastunet.kernels.conv3x3.config import ConvShape
from torch import Tensor

import fastunet
from fastunet import dispatch, ops
from fastunet.testing import float32_precision, parity
from fastunet.testing.parity import Case

from . import reachable
from .cases import UP_CONV

TARGETS = tuple(gpu.SHARED_MEMORY_LIMITS)
# What has kernels of its own and is no public op.
E4M3 = "e4m3"
OPS = (*ops.__all__, E4M3)
# The side of an image beyond which no other configuration is chosen.
_LARGEST = 128
_HALO_SHAPES = (ConvShape(64, 0, 64, 128, 128), ConvShape(64, 64, 64, 128, 128), ConvShape(128, 0, 128, 256, 256))
# Ops whose kernels are those of all with a 3x3 convolution; what others add to them is compiled at one size.
_CONVOLUTIONS = (
    *("conv3x3_bias_relu", "conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu", "conv3x3_batch_norm_relu"),
    *("conv3x3_relu_conv1x1", UP_CONV),
)
# Channels in and out, and sides of the images.
_E4M3_SHAPES = tuple(itertools.product(((32, 64), (64, 64), (128, 128), (64, 128)), (128, 48, 8)))
# Of tensors that have not the op's.
_DTYPES = {"gamma": torch.float32, "beta": torch.float32, "indices": torch.int64, "mask": torch.uint8}


class Call(NamedTuple):
    """A call of an op, in inference and in training, for what it launches."""

    op: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """One compilation: of what call number `call` launches as number `index`, in a number format of `parity.FORMATS`,
    for the usual GPU of that capability; a convolution of that stride.
    """

    op: str
    kernel: str
    math: str
    capability: int
    call: int
    index: int
    stride: int = 1


def jobs(targets: Iterable[int], formats: Iterable[str], of: Collection[str] = OPS) -> Iterator[Job]:
    """Yield a job for each launch, of those ops, that is not compiled like one before."""
    for capability, math in itertools.product(targets, formats):
        seen = set()
        for number, call in enumerate(calls(math, capability)):
            for index, launch in enumerate(record(call, math, capability) if call.op in of else ()):
                if (key := _specialisation(launch)) not in seen:
                    seen.add(key)
                    stride = launch.arguments.get("STRIDE", 1)
                    yield Job(call.op, launch.kernel.__name__, math, capability, number, index, stride)


def one_of_each(found: Iterable[Job]) -> list[Job]:
    """Return the last job of each kernel, on 8 bits and by stride 2 for itself, and target: most have their largest
    blocks then.
    """
    return list({(job.kernel, job.stride, job.op == E4M3, job.capability): job for job in found}.values())


def launch_of(job: Job) -> gpu.Launch:
    """Return what the op launches. KeyError for a capability that is not among TARGETS."""
    return record(calls(job.math, job.capability)[job.call], job.math, job.capability)[job.index]


def record(call: Call, math: str, capability: int) -> list[gpu.Launch]:
    """Return what the call would launch there."""
    target = gpu.known_target(capability)
    with gpu.recording(target) as found, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(config_hopper, "unsupported_reason", return_value=None))
        # So that the kernels take tensors of the CPU.
        stack.enter_context(mock.patch.object(dispatch, "interpreting", return_value=True))
        # No table's configurations, and no choice that was made for another target.
        stack.enter_context(mock.patch.multiple(autotune, _tables={target.name: {}}, _generation=object()))
        stack.enter_context(fastunet.backend("triton"))
        stack.enter_context(float32_precision("tf32" if math == "tf32" else "ieee"))
        call.run()
    return found


def _specialisation(launch: gpu.Launch) -> tuple[Any, ...]:
    """Return what Triton compiles a launch by: constants, dtypes, boxes, which integers are 1 or multiples of 16."""
    found: list[Any] = [launch.kernel, *launch.options.values()]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            found.append((value.dtype, value.data_ptr() % 16 == 0))
        elif hasattr(value, "block_shape"):
            found.append((value.base.dtype, *value.block_shape))
        elif parameter.is_constexpr or not isinstance(value, int):
            found.append(str(value) if parameter.is_constexpr else type(value))
        else:
            found.append(parameter.do_not_specialize or (value == 1, value % 16 == 0))
    return tuple(found)


def describe(launch: gpu.Launch) -> str:
    """The configuration in short: the blocks in the kernel's order, warps, stages, or the slots of rings."""
    arguments = launch.arguments
    blocks = [str(value) for name, value in arguments.items() if name.startswith(("TILE_", "BLOCK"))]
    said = f"{'x'.join(blocks)} w{launch.num_warps}"
    if "SLOTS" not in arguments:
        return f"{said} s{launch.num_stages}"
    return f"{said} s{arguments['SLOTS']}/{arguments['WEIGHT_SLOTS']}"


# --- the calls ---


@functools.lru_cache(1)  # A compiling process asks for each of its jobs.
def calls(math: str, capability: int) -> list[Call]:
    """Return the calls whose launches have every configuration for a number format and the usual GPU of a capability.

    fp16, which compiles like bf16, and sm_86, like sm_89, at one size alone.
    """
    (dtype, allow_tf32), target = parity.FORMATS[math], gpu.known_target(capability)
    options: dict[str, Any] = {"dtype": dtype, "target": target, "allow_tf32": allow_tf32}
    shapes = [
        replace(shape, height=min(shape.height, _LARGEST), width=min(shape.width, _LARGEST))
        for shape in reachable.convolutions(**options).values()
    ]
    widest = max(shapes, key=lambda shape: (shape.aligned, shape.c1, shape.c_out))
    if dtype == torch.float16 or capability == 86:
        return [_call(case, dtype) for case in _cases(widest)]
    cases = [case for shape in shapes for case in _cases(shape) if case.op in _CONVOLUTIONS or _stride(case) == 2]
    for case in _cases(widest):
        leaky = {"negative_slope": 0.1} if "conv3x3" in case.op else {}
        cases.append(replace(case, options={**case.options, **leaky}))
    cases += [*_convolutions(shapes, **options), *_single_pixels(**options), *_passes()]
    found = [_call(case, dtype) for case in cases]
    found += _split(shapes, **options)
    contiguous = [_case("conv3x3_bias_relu", replace(shape, height=8, width=8)) for shape in shapes]
    found += [_call(case, dtype, channels_last=False) for case in contiguous]
    if dtype == torch.bfloat16:
        found += _halo(target)
        found += [_e4m3(*each) for each in _E4M3_SHAPES if config.has_fp8(target)]
    return found


def _cases(shape: ConvShape) -> list[Case]:
    """Every op with ReLU on images of that size, by stride 2 on those that come to it; those without a backward also
    with a norm, as nets have it.
    """
    found, each = [], torch.ones(shape.c_out)
    by_stride = {
        stride: parity.cases_of(2, shape.c1, stride * shape.height, stride * shape.width, shape.c_out)
        for stride in (1, 2)
    }
    for case in (case for stride, cases in by_stride.items() for case in cases if _stride(case) == stride):
        options = {name: value for name, value in case.options.items() if name != "negative_slope"}
        found.append(replace(case, options=options))
        if not case.backward:
            found.append(replace(case, options={**options, "norm": (each, each, each, 1e-5)}))
    return found


def _stride(case: Case) -> int:
    return case.options.get("stride", 1)


def _case(op: str, shape: ConvShape) -> Case:
    return next(case for case in _cases(shape) if case.op == op)


def _convolutions(shapes: Iterable[ConvShape], **options: Any) -> Iterator[Case]:
    """Those of which gradients have configurations of their own; odd sides, which upsampling does not lead to."""
    for shape in reachable.weight_grads(**options).values():
        yield _case("conv3x3_bias_relu", shape)
    for channels in (24, 72):  # Multiples of 8, of which gpu.launch tells kernels.
        shape = ConvShape(channels, 0, channels, 32, 32)
        yield from (_case(op, shape) for op in ("conv3x3_batch_norm_relu", "concat_conv3x3_bias_relu"))
    for shape in shapes:
        turned = replace(shape, c1=shape.c_out, c_out=shape.c1)  # An input gradient's channels are a convolution's.
        yield from (_case(op, turned) for op in ("conv3x3_bias_relu", "concat_conv3x3_bias_relu"))
        yield _halves(turned)
        yield _case(UP_CONV, replace(shape, height=shape.height | 1, width=shape.width | 1))


def _halves(shape: ConvShape) -> Case:
    """A concatenation of two inputs of as many channels, whose gradients may be one program's."""
    case = _case("concat_conv3x3_bias_relu", shape)
    weight = (shape.c_out, 2 * shape.c1, 3, 3)
    return replace(case, shapes={**case.shapes, "up": case.shapes["skip"], "weight": weight})


def _split(shapes: Iterable[ConvShape], dtype: torch.dtype, target: gpu.Target, *, allow_tf32: bool) -> Iterator[Call]:
    """Sums split among programs: of so many channels on so small an image, with the blocks of each of the shapes."""
    for shape in shapes:
        deep = replace(shape, c1=16 * shape.c1, c2=32 * shape.c1, height=8, width=8)
        chosen = config.heuristic_conv_config(deep, dtype, target, allow_tf32)
        if config.splittings(chosen, deep, target):
            pin = config.CONV3X3, replace(chosen, splits=2)
            for op in ("conv3x3_batch_norm_relu", "conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu"):
                yield _call(_case(op, deep), dtype, pin)


def _single_pixels(dtype: torch.dtype, target: gpu.Target, *, allow_tf32: bool) -> Iterator[Case]:
    """The transposed convolution, and the head with every activation."""
    options: dict[str, Any] = {"dtype": dtype, "target": target, "allow_tf32": allow_tf32}
    for found in (
        reachable.pixel_products(**options),
        reachable.pixel_weight_grads(**options),
        reachable.subpixel_tiles(dtype, target),
    ):
        for c_in, c_out in found.values():
            yield _case("conv_transpose2x2", ConvShape(c_in, 0, c_out, 32, 32))
    for channels in (24, 72):  # Multiples of 8, of which gpu.launch tells kernels.
        yield _case("conv_transpose2x2", ConvShape(channels, 0, channels, 32, 32))
    heads = [*reachable.heads(**options).values(), (17, 17), (24, 3), (72, 72)]
    for (c_in, c_out), activation in itertools.product(heads, (None, "sigmoid", "softmax")):
        shapes = {"x": (2, c_in, 64, 64), "weight": (c_out, c_in, 1, 1), "bias": (c_out,)}
        yield Case("conv1x1", shapes, {"activation": activation})


def _passes() -> Iterator[Case]:
    """Norms, pooling, and the sums of losses."""
    for channels in (*reachable.norm_grads().values(), 100):
        for op in ("conv3x3_batch_norm_relu_pool", "conv3x3_instance_norm_relu_pool"):
            yield _case(op, ConvShape(16, 0, channels, 256, 256))
    for channels in (*reachable.pointwise().values(), 3, 100):  # The last two load no vectors.
        yield _case("max_pool2x2", ConvShape(channels, 0, 1, 64, 64))
        yield _case("conv3x3_bias_relu_pool", ConvShape(16, 0, channels, 64, 64))
    for number, channels in enumerate((*reachable.pixels().values(), 3)):  # Three is no power of two.
        yield _sums(number, channels)


def _sums(number: int, channels: int) -> Case:
    """The bits of number: activation, kind of target, mask. One channel has neither a softmax nor indices."""
    softmax, indices, masked = ((number >> bit) % 2 == 0 for bit in range(3))
    options = {"squared": number % 3 == 1, "entropy": number % 5 != 4}
    activation = {"activation": "softmax" if softmax and channels > 1 else "sigmoid"}
    truth = {"indices": (2, 1, 64, 64)} if indices and channels > 1 else {"target": (2, channels, 64, 64)}
    mask = {"mask": (2, 1, 64, 64)} if masked else {}
    return Case("segmentation_sums", {"logits": (2, channels, 64, 64), **truth, **mask}, {**activation, **options})


def _halo(target: gpu.Target) -> Iterator[Call]:
    """Every op with the blocks that a search begins with; with all others what wants most registers."""
    dtype = torch.bfloat16
    for shape in _HALO_SHAPES:
        if config_hopper.fits_halo(shape, dtype, target):
            found = config_search.feasible_configs(config.CONV3X3, shape, dtype, target, allow_tf32=False)
            first, *others = [chosen for chosen in found if chosen.variant == config.HALO]
            cases = [
                replace(case, backward=False)
                for case in _cases(shape)
                if "conv3x3" in case.op and "stride" not in case.options
            ]
            yield from (_call(case, dtype, (config.CONV3X3, first)) for case in cases)
            yield _call(_case("double_conv3x3_bias_relu", shape), dtype, (config.INPUT_GRAD, first))  # One with a mask.
            op = "concat_conv3x3_batch_norm_relu" if shape.c2 else "conv3x3_batch_norm_relu_pool"
            case = next(case for case in cases if case.op == op)
            for training in (False, True):  # True leaves statistics.
                case = replace(case, options={**case.options, "training": training})
                yield from (_call(case, dtype, (config.CONV3X3, chosen)) for chosen in others)


def _call(
    case: Case, dtype: torch.dtype, override: tuple[str, Any] | None = None, *, channels_last: bool = True
) -> Call:
    """The op in inference and, if it has a backward, in training. override: a kernel, and a configuration for it."""

    def run() -> None:
        inputs = {name: _tensor(shape, _DTYPES.get(name, dtype), channels_last) for name, shape in case.shapes.items()}
        buffers = {} if case.buffers is None else {name: torch.ones(case.buffers) for name in ("mean", "variance")}
        with contextlib.nullcontext() if override is None else autotune.overriding(*override):
            with torch.no_grad():
                parity.run_op(case.op, inputs, buffers, case.options)
            if case.backward:
                for name, t in inputs.items():
                    t.requires_grad_(name != "target" and t.is_floating_point())
                outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
                parity.results_of(outputs, inputs, [torch.empty_like(y) for y in outputs])

    return Call(case.op, run)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)


def _e4m3(channels: tuple[int, int], side: int) -> Call:
    """What a net in 8 bits launches beside its convolutions in 16."""
    (c_in, c_out), dtype = channels, torch.bfloat16

    def run() -> None:
        from fastunet.kernels.conv3x3 import fp8, pointer
        from fastunet.kernels.conv_transpose2x2 import conv_transpose2x2
        from fastunet.kernels.epilogue import Normalisation

        each, scale = torch.empty(c_out), torch.empty(1)
        norm, scales = Normalisation(each, each, each, 1e-5), {"y_scale": scale, "pooled_scale": scale}
        first, x, up = (_tensor((2, c, side, side), dtype) for c in (3, c_in, c_in))
        for second, pool, written in ((None, False, {}), (None, True, {}), (up, False, {}), (None, True, scales)):
            weight = _tensor((c_out, c_in if second is None else 2 * c_in, 3, 3), torch.float8_e4m3fn)
            fp8.conv3x3_fp8(x, second, weight, scale, each, norm, 0.0, dtype=dtype, pool=pool, **written)
        pointer.conv3x3(first, _tensor((c_out, 3, 3, 3), dtype), each, y_scale=scale)
        if config_pixels.writes_e4m3(c_in, c_out, dtype, gpu.target(x.device)):
            conv_transpose2x2(x, _tensor((c_in, c_out, 2, 2), dtype), each.to(dtype), y_scale=scale)

    return Call(E4M3, run)
