"""Ops, layers and nets ready to be timed: their tensors, their calls, and what must hold of a result before by float64.

A comparison times its providers in turn in one run, the first of them ours; what is not right, or does not run, has no
time, and is named with its reason.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.losses import BCEDiceLoss
from fastunet.measuring.timing import Clock, clock_of, cudnn_benchmark, interleaved_samples, sets_past_cache
from fastunet.testing import UNIT_ROUNDOFF, parity, random_cotangent
from fastunet.testing.ops import Call
from fastunet.testing.parity import Case

from .cases import Layer, Settings
from .providers import Provider, Run, bce_dice
from .results import Row, Unavailable, failure, timed, times_ms

Inputs = dict[str, Tensor]
Runs = dict[str, list[Run]]
# A net in a dtype may be this many times as far from float64 as plain torch modules are in the same dtype.
_TIMES_PLAIN = 2.0
# Side of the images on which a net's gradients are compared with float64.
_PARITY_SIDE = 64
# The spread, p90 / p10, of the plainest provider's times, above which other work has disturbed the machine too much.
STEADY = 1.15
# Of a net on a CPU: seconds that a sample is to take, the most calls in it, and seconds of rest before it.
_SAMPLE_SECONDS, _MOST_CALLS, _REST = 0.1, 100, 0.02


# --- comparisons ---


def prepared(
    providers: Sequence[Provider], prepare: Callable[[Provider], list[Run]], check: Callable[[Provider, Any], object]
) -> tuple[Row, Runs]:
    """Return the row of the providers, the first of them ours, and the runs of those whose first result is right.

    "status" is "ok", or "parity failed" or "failed" where ours is not among them; then none is. "missing": why others
    are not.
    """
    forms = {each.name: {"layout": each.layout, "dtype": each.dtype} for each in providers}
    row: Row = {"status": "ok", "reason": "", "missing": {}, "forms": forms}
    runs: Runs = {}
    for provider in providers:
        try:
            if provider.unavailable:
                raise Unavailable(provider.unavailable)
            with cudnn_benchmark():
                found = prepare(provider)
                result = found[0]()
            check(provider, result)
            runs[provider.name] = found
        except Exception as error:  # A compiler's, a driver's: a provider that fails is not the end of the comparison.
            failed = failure(error)
            is_wrong = failed["status"] == "parity failed"
            row["missing"][provider.name] = ("parity failed: " if is_wrong else "") + failed["reason"]
            if provider is providers[0]:
                return row | failed, {}
    return row, runs


def measured(settings: Settings, row: Row, runs: Mapping[str, Sequence[Run]]) -> Row:
    """Return the row with what timing its runs in turn gives, the first of them ours: samples and ratios.

    A sample of a net on a CPU is the mean of as many calls as take some 0.1 s, as in a loop over images, after a rest:
    a call of a small net by itself is mostly what the provider before it has left in the caches, and on the cores,
    where threads of some runtimes stay awake for a while.
    """
    if not runs:
        return row
    calls, rest = 1, 0.0
    if settings.device == "cpu" and row.get("kind") == "net":
        ours = next(iter(runs.values()))[:1]
        least = min(interleaved_samples({"ours": ours}, Clock(), rounds=3, warmup=1)["ours"])
        calls, rest = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / least))), _REST
        row = row | {"calls": calls}
    repeated = {name: [functools.partial(_repeat, run, calls) for run in found] for name, found in runs.items()}
    samples = samples_in_turn(settings, repeated, rest)
    row = row | timed({name: [seconds / calls for seconds in found] for name, found in samples.items()})
    if "eager" in row["samples_ms"]:
        times = times_ms(row)["eager"]
        row["unsteady"] = times.p90 / times.p10 > STEADY
    return row


def _repeat(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()


def samples_in_turn(settings: Settings, runs: Mapping[str, Sequence[Run]], rest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn in one run, within the settings' limits."""
    limits: dict[str, Any] = {"rounds": settings.rounds, "warmup": settings.warmup, "seconds": settings.seconds}
    with cudnn_benchmark():
        return interleaved_samples(runs, clock_of(settings.torch_device, rest), **limits)


def layer_runs(
    settings: Settings, layer: Layer, providers: Sequence[Provider], *, backward: bool = False
) -> tuple[Row, Runs]:
    """As `prepared`, of a layer on inputs that have left the cache. backward: of which ours, the first, is checked
    alone.
    """
    inputs = device_inputs(layer, settings.torch_device, settings.torch_dtype)
    sets = input_sets(inputs, settings.torch_device)

    def prepare(provider: Provider) -> list[Run]:
        if backward and provider is providers[0]:
            check_backward(layer, inputs)
        return [provider.prepare(each) for each in sets]

    def check(provider: Provider, result: Any) -> None:
        if not backward:
            check_layer(layer, inputs, result, allow_tf32=settings.device == "cuda")

    return prepared(providers, prepare, check)


def net_runs(settings: Settings, task: str, providers: Sequence[Provider]) -> tuple[Row, Runs]:
    """As `prepared`, of the net's "inference" or "training" step. Ours trains only if its gradients are right."""
    training, model = task == "training", make_net(settings)
    x, target = images_and_masks(settings, settings.batch, settings.size)

    def prepare(provider: Provider) -> list[Run]:
        if training and provider is providers[0]:
            check_gradients(settings, model)
        return [provider.prepare(model, x, target if training else None)]

    return prepared(providers, prepare, net_check(model, x, target, training=training))


# --- ops and layers ---


def case_run(
    case: Case,
    inputs: Mapping[str, Tensor],
    backend: str,
    direction: str,
    wanted: Sequence[str] | None = None,
    function: Callable[..., Any] = parity.run_op,
) -> Run:
    """Bind one call of the op under a backend: "forward" without gradients, or "backward" alone with the graph kept,
    for random cotangents, and the gradients of the `wanted` inputs (all but a target).

    function: computes the op, with the arguments of `parity.run_op`.
    """
    buffers = {}
    if case.buffers is not None:
        zeros = torch.zeros(case.buffers, device=next(iter(inputs.values())).device)
        buffers = {"running_mean": zeros, "running_var": torch.ones_like(zeros)}

    def forward() -> Any:
        with torch.no_grad(), fastunet.backend(backend):
            return function(case.op, inputs, buffers, case.options)

    if direction == "forward":
        return forward
    names = [name for name in inputs if name != "target"] if wanted is None else wanted
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in inputs.items()}
    with fastunet.backend(backend):
        outputs = parity.outputs_of(function(case.op, leaves, buffers, case.options))
    cotangents = [random_cotangent(y, seed=i) for i, y in enumerate(outputs)]

    def backward() -> Any:
        with fastunet.backend(backend):
            return torch.autograd.grad(outputs, [leaves[name] for name in names], cotangents, retain_graph=True)

    return backward


def wanted_of(layer: Layer) -> list[str]:
    """The inputs of a layer whose gradients a training step takes."""
    return [name for name in layer.shapes if layer.input_has_grad or name != "x"]


def input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The inputs and as many copies as it takes for each to have left the cache before its next turn."""
    copies = sets_past_cache(list(inputs.values()), device)
    return [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in range(copies - 1))]


def device_inputs(layer: Layer, device: torch.device, dtype: torch.dtype) -> Inputs:
    """As parity.make_inputs, made on the device, where it takes no time."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for name, shape in layer.shapes.items():
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        t = torch.empty(shape, dtype=dtype, device=device, memory_format=format)
        inputs[name] = t.normal_(0, parity.scale_of(name, shape), generator=generator)
    return inputs


def check_layer(layer: Layer, inputs: Mapping[str, Tensor], result: Any, *, allow_tf32: bool = False) -> None:
    """AssertionError, naming the worst element, unless the last image of a layer's forward result is within bounds.

    The bounds are those of `expected`: derived from the shapes and the dtype, whoever computed it.
    """
    call = Call(layer.op, _last_image(inputs), {}, {}, [], allow_tf32=allow_tf32, stores_steps=True)
    outputs = [y[-1:] for y in parity.outputs_of(result)]
    parity.compare(dict(zip(("y", "pooled"), outputs, strict=False)), call)


def check_backward(layer: Layer, inputs: Inputs) -> None:
    """AssertionError unless the gradients of the batch's last image come out right under the backend in force.

    Only its cotangents are not zero, so that the parameters' gradients are those of one image, whatever the batch.
    """
    wanted = wanted_of(layer)
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [torch.randn_like(y) for y in outputs]
    for cotangent in cotangents:
        cotangent[:-1] = 0
    last = _last_image(parity.results_of(outputs, leaves, cotangents))
    call = Call(layer.op, _last_image(inputs), {}, {}, [g[-1:] for g in cotangents], **parity.how(layer.op, last))
    parity.compare(last, call, without=[] if layer.input_has_grad else ["grad x"])


def _last_image(tensors: Mapping[str, Tensor]) -> Inputs:
    return {name: t if "weight" in name or "bias" in name else t[-1:] for name, t in tensors.items()}


# --- nets ---


def make_net(settings: Settings) -> fastunet.UNet:
    """The settings' net on their device, with the same weights every time."""
    torch.manual_seed(0)
    channels = settings.in_channels, settings.out_channels
    return fastunet.UNet(*channels, features=settings.features, norm=settings.norm).to(settings.device)


def images_and_masks(settings: Settings, batch: int, side: int) -> tuple[Tensor, Tensor]:
    """Random images [batch, C, side, side] and masks of 0 and 1, channels_last."""
    x = torch.randn(batch, settings.in_channels, side, side, device=settings.device)
    masks = torch.randint(0, 2, (batch, settings.out_channels, side, side), device=settings.device).float()
    return x.contiguous(memory_format=torch.channels_last), masks.contiguous(memory_format=torch.channels_last)


def check_gradients(settings: Settings, model: fastunet.UNet) -> None:
    """AssertionError unless the net's gradients, under the backend in force, are at most twice as far from float64 as
    those of the same net in plain torch modules: relatively, in the 2-norm of all.

    Both nets round in the settings' dtype; ours rounds no more often.
    """
    x, target = images_and_masks(settings, 2, min(settings.size, _PARITY_SIDE))
    reference = model.to_reference()
    with fastunet.backend("aten"):  # The loss is an op of ours in all three.
        exact = _gradients(copy.deepcopy(reference).double(), x.double(), target.double(), torch.float64)
        plain = distance(_gradients(reference, x, target, settings.torch_dtype), exact)
    ours = distance(_gradients(copy.deepcopy(model), x, target, settings.torch_dtype), exact)
    allowed = _TIMES_PLAIN * plain
    assert ours <= allowed, f"relative distance of the gradients to float64: {ours:.2e}, allowed {allowed:.2e}"


def _gradients(net: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        logits = net.train()(x)
    BCEDiceLoss()(logits, target).backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def distance(actual: Tensor, exact: Tensor) -> float:
    """How far a result is from float64: relatively, in the 2-norm."""
    return float((actual - exact).norm() / exact.norm())


def net_check(model: fastunet.UNet, x: Tensor, target: Tensor, *, training: bool) -> Callable[[Provider, Tensor], None]:
    """Return what raises AssertionError where a provider's first result on images x is off by more than is allowed: the
    loss of a training step, or the outputs of inference, of which the last image's are looked at.

    Outputs may be twice as far from float64, relatively and in the 2-norm, as plain modules of the provider's dtype
    are, or as far as roundings alone may take them; the loss, by what that can do to it (`loss_bound`).
    """
    model, x, target = copy.deepcopy(model).train(training), x if training else x[-1:], target.double()
    exact = _plain_outputs(model, x, torch.float64)

    @functools.cache
    def allowed_share(dtype: torch.dtype) -> float:
        plain = distance(_plain_outputs(model, x, dtype), exact)
        return max(_TIMES_PLAIN * plain, distance(_rounded_outputs(model, x, dtype), exact))

    def check(provider: Provider, result: Tensor) -> None:
        allowed = allowed_share(getattr(torch, provider.dtype))
        if training:
            what, off = "the loss", abs(float(result) - float(bce_dice(exact, target)))
            allowed = loss_bound(allowed, exact, target)
        else:
            what, off = "the outputs, relative", distance(result[-1:].double(), exact)
        assert off <= allowed, f"{provider.name}: distance to float64 of {what}: {off:.2e}, allowed {allowed:.2e}"

    return check


def _rounded_outputs(model: fastunet.UNet, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 net's outputs, each layer's result off at random as far as roundings may take it.

    A convolution's by as much as `fastunet.testing` grants its sum and its result, a norm's by its result's rounding.
    A norm of few values magnifies what came in; how much, only the net itself tells.
    """
    generator = torch.Generator(x.device).manual_seed(0)

    def disturb(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
        size = UNIT_ROUNDOFF[dtype]
        if isinstance(module, nn.Conv2d):
            size += 6 * module.weight[0].numel() ** 0.5 * UNIT_ROUNDOFF[torch.float32]
        noise = torch.rand(result.shape, generator=generator, dtype=torch.float64, device=result.device)
        return result * (1 + size * (2 * noise - 1))

    net = model.to_reference().double()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d):
            module.register_forward_hook(disturb)
    with torch.no_grad():
        return net(x.double())


def _plain_outputs(model: fastunet.UNet, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of plain modules in that dtype (16 bits in training: under autocast), in float64."""
    amp = model.training and dtype.itemsize == 2
    held = torch.float32 if amp else dtype
    net = model.to_reference().to(held)
    with torch.no_grad(), torch.autocast(x.device.type, dtype) if amp else nullcontext():
        return net(x.to(held)).double()


def loss_bound(share: float, logits: Tensor, target: Tensor) -> float:
    """How far BCE + Dice may be off where the logits, float64 [N, C, H, W], are off by that relative 2-norm.

    With e the root mean square of the errors: the derivative of a pixel's cross entropy by its logit is at most 1, so
    that the mean is off by e at most; that of a channel's Dice is at most 2 / (sum p + sum t) by a probability, and so
    1 / (2 sum t) by a logit. The rest are float32 roundings of the sums.
    """
    e = share * float(logits.square().mean().sqrt())
    pixels = target[0, 0].numel()
    of_dice = float((pixels / (2 * target.sum((2, 3)))).max())
    roundings = (6 * pixels**0.5 + 16) * UNIT_ROUNDOFF[torch.float32]
    return e * (1 + of_dice) + roundings * (float(bce_dice(logits, target)) + 1)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one run takes beside what was allocated before it; None on a CPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
