"""Layers and nets ready to be timed: their tensors, their calls, and what must hold of a result before, by float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.losses import BCEDiceLoss
from fastunet.testing import UNIT_ROUNDOFF, parity
from fastunet.testing.ops import Call

from .cases import DTYPE, Layer, Settings
from .harness.timing import clock_of, cudnn_benchmark, interleaved_samples, sets_past_cache
from .providers import Provider, Run, bce_dice, our_net, reason_of
from .results import Row, timed

Inputs = dict[str, Tensor]
Runs = dict[str, list[Run]]
Around = Callable[[], AbstractContextManager[Any]]
# A net in a dtype may be this many times as far from float64 as plain torch modules are in the same dtype.
_TIMES_PLAIN = 2.0
# Side of the images on which a net's own implementation is compared with float64.
_PARITY_SIDE = 64


def runs_or_reason(
    provider: Provider, prepare: Callable[[Provider], list[Run]], check: Callable[[Provider, Any], object]
) -> list[Run] | str:
    """A provider's runs, the first of which was right; or why there are none."""
    try:
        with cudnn_benchmark():
            runs = prepare(provider)
            result = runs[0]()
        check(provider, result)
    except Exception as error:  # A compiler's, a driver's: a provider that fails is not the end of the comparison.
        return reason_of(error)
    return runs


def right_runs(
    providers: Sequence[Provider],
    prepare: Callable[[Provider], list[Run]],
    check: Callable[[Provider, Any], object],
    skip: Mapping[str, str] | None = None,
) -> tuple[Runs, dict[str, str]]:
    """The runs of each provider that is right, by name; and of the others why they have none. skip: reasons not to."""
    runs: Runs = {}
    missing: dict[str, str] = {}
    for provider in providers:
        found = provider.unavailable or (skip or {}).get(provider.name) or runs_or_reason(provider, prepare, check)
        if isinstance(found, str):
            missing[provider.name] = found
        else:
            runs[provider.name] = found
    return runs, missing


def time_in_turn(settings: Settings, runs: Mapping[str, Sequence[Run]]) -> Row:
    """Time all in one run, the first of them ours: samples and ratios."""
    with cudnn_benchmark():
        samples = interleaved_samples(
            runs,
            clock_of(settings.torch_device),
            rounds=settings.rounds,
            warmup=settings.warmup,
            seconds=settings.seconds,
        )
    return timed(samples)


# --- layers ---


def prepare_layer(layer: Layer, sets: Sequence[Inputs], backends: Sequence[str], *, backward: bool) -> Runs:
    """By backend, one call of the layer, or of its backward, for each set of inputs.

    AssertionError unless the first backend's results are right.
    """
    with fastunet.backend(backends[0]):
        check_last_image(layer, sets[0], backward=backward)
    make = backward_run if backward else forward_run
    return {backend: [make(layer, backend, each) for each in sets] for backend in backends}


def layer_sets(layer: Layer, device: torch.device) -> list[Inputs]:
    """Random inputs of the layer, in sets."""
    return input_sets(device_inputs(layer, device), device)


def input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The inputs and as many copies as it takes for each to have left the cache before its next turn."""
    copies = sets_past_cache(list(inputs.values()), device)
    return [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in range(copies - 1))]


def device_inputs(layer: Layer, device: torch.device, dtype: torch.dtype = DTYPE) -> Inputs:
    """As parity.make_inputs, made on the device, where it takes no time."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for name, shape in layer.shapes.items():
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        t = torch.empty(shape, dtype=dtype, device=device, memory_format=format)
        inputs[name] = t.normal_(0, parity.scale_of(name, shape), generator=generator)
    return inputs


def check_last_image(layer: Layer, inputs: Inputs, *, backward: bool, around: Around = nullcontext) -> None:
    """AssertionError unless the last image of the batch comes out right, and the gradients of it alone.

    Only its cotangents are not zero, so that the parameters' gradients are those of one image, whatever the batch.
    around: a context for the direction that is checked, and that one alone.
    """
    leaves = _leaves(layer, inputs) if backward else inputs
    with torch.set_grad_enabled(backward), nullcontext() if backward else around():
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [_last_only(torch.randn_like(y)) for y in outputs] if backward else []
    with around() if backward else nullcontext():
        actual = parity.results_of(outputs, leaves, cotangents)
    last = _last_image(actual)
    images = _last_image(inputs)
    call = Call(layer.op, images, {}, {}, [g[-1:] for g in cotangents], **parity.how(layer.op, last))
    parity.compare(last, call, without=[] if layer.input_has_grad else ["grad x"])


def _last_image(tensors: Mapping[str, Tensor]) -> Inputs:
    return {name: t if "weight" in name or "bias" in name else t[-1:] for name, t in tensors.items()}


def _last_only(cotangent: Tensor) -> Tensor:
    cotangent[:-1] = 0
    return cotangent


def _leaves(layer: Layer, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(layer.input_has_grad or name != "x") for name, t in inputs.items()}


def forward_run(layer: Layer, backend: str, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """One call of the layer."""

    def run() -> None:
        with torch.no_grad(), fastunet.backend(backend):
            parity.run_op(layer.op, inputs, {}, {})

    return run


def backward_run(
    layer: Layer, backend: str, inputs: Mapping[str, Tensor], only: Sequence[str] = ()
) -> Callable[[], Any]:
    """One backward pass of the layer, with the graph kept, for random cotangents: all gradients, or `only` those."""
    leaves = _leaves(layer, inputs)
    with fastunet.backend(backend):
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [torch.randn_like(y) for y in outputs]
    wanted = [t for name, t in leaves.items() if t.requires_grad and (not only or name in only)]

    def run() -> None:
        with fastunet.backend(backend):
            torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return run


def check_layer(layer: Layer, inputs: Mapping[str, Tensor], result: Any, *, allow_tf32: bool = False) -> None:
    """AssertionError, naming the worst element, unless the last image of a layer's forward result is within bounds.

    The bounds are those of `expected`: derived from the shapes and the dtype, whoever computed it.
    """
    call = Call(layer.op, _last_image(inputs), {}, {}, [], allow_tf32=allow_tf32, stores_steps=True)
    outputs = [y[-1:] for y in parity.outputs_of(result)]
    parity.compare(dict(zip(("y", "pooled"), outputs, strict=False)), call)


# --- nets ---


def make_net(settings: Settings) -> fastunet.UNet:
    """The settings' net on their device, with the same weights every time."""
    torch.manual_seed(0)
    model = fastunet.UNet(settings.in_channels, settings.out_channels, features=settings.features)
    return model.to(settings.device)


def prepare_net(
    settings: Settings, model: fastunet.UNet, backends: Sequence[str], *, training: bool
) -> tuple[Row, dict[str, Run]]:
    """The distances to float64, and by backend one call of the net's inference, or one training step, on copies.

    AssertionError unless the first backend's results are right. The kernels' runs are there also without what can be
    left out: in training, outputs recomputed; in inference, upsampling fused with the convolution after it.
    """
    distances = check_net(settings, model, backends[0], training=training)
    x = images(settings, settings.batch, settings.size)
    target = target_for(settings, x)

    def run_of(model: fastunet.UNet, backend: str) -> Run:
        return our_net(backend, DTYPE, training=training)(model, x, target)

    runs = {backend: run_of(model, backend) for backend in backends}
    if backends[0] != "triton":
        return distances, runs
    if training:
        recomputing = run_of(model, "triton")

        def run_keeping() -> None:
            with fastunet.recomputing(False):
                recomputing()

        return distances, {**runs, "triton, outputs kept": run_keeping}
    apart = copy.deepcopy(model)
    for up in apart.ups:
        up.folds_upsampling = False
    return distances, {**runs, "triton, steps up in two": run_of(apart, "triton")}


def images(settings: Settings, batch: int, side: int) -> Tensor:
    """Random images [batch, C, side, side], channels_last."""
    x = torch.randn(batch, settings.in_channels, side, side, device=settings.device)
    return x.contiguous(memory_format=torch.channels_last)


def target_for(settings: Settings, x: Tensor) -> Tensor:
    """Random masks of 0 and 1 for the images x."""
    shape = (x.shape[0], settings.out_channels, *x.shape[2:])
    return torch.randint(0, 2, shape, device=x.device).float().contiguous(memory_format=torch.channels_last)


def check_net(settings: Settings, model: fastunet.UNet, backend: str, *, training: bool) -> Row:
    """AssertionError unless the net is at most twice as far from float64 as the same net in plain torch modules.

    Distances are relative, in the 2-norm: of the outputs, in training of all gradients. Both nets round in the same
    dtype; ours rounds no more often.
    """
    x = images(settings, 2, min(settings.size, _PARITY_SIDE))
    target = target_for(settings, x)
    reference = model.to_reference()
    with fastunet.backend("aten"):  # The loss is an op of ours in all three.
        exact = _result(copy.deepcopy(reference).double(), x.double(), target.double(), training)
        plain = _distance(_result(reference, x, target, training), exact)
    with fastunet.backend(backend):
        ours = _distance(_result(copy.deepcopy(model), x, target, training), exact)
    assert ours <= 2 * plain, f"relative distance to float64: {ours:.2e}, of plain torch {plain:.2e}"
    return {"ours": ours, "plain": plain}


def _result(net: nn.Module, x: Tensor, target: Tensor, training: bool) -> Tensor:
    """Outputs, or gradients, in one row, in float64."""
    exact = x.dtype == torch.float64
    net.train(training)
    if not training:
        with torch.no_grad():
            return (net(x) if exact else net.to(DTYPE)(x.to(DTYPE))).double().flatten()
    with torch.autocast(x.device.type, DTYPE, enabled=not exact):
        logits = net(x)
    BCEDiceLoss()(logits, target).backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


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


class NetCheck:
    """What a model gives on images x, in float64 and by plain modules, and whether a provider's first result is right.

    training: the result is the loss of the first step, else the outputs, of which the last image's are looked at. The
    float64 net is run once.
    """

    def __init__(self, model: fastunet.UNet, x: Tensor, target: Tensor, *, training: bool) -> None:
        self._model, self._x, self._training = copy.deepcopy(model).train(training), x if training else x[-1:], training
        self._target = target.double()
        self._exact = self._outputs(torch.float64)
        self._allowed: dict[str, float] = {}

    def check(self, provider: Provider, result: Tensor) -> float:
        """How far the result of the provider's first run is off: AssertionError if by more than is allowed.

        Outputs may be twice as far from float64, relatively and in the 2-norm, as plain modules of the provider's dtype
        are, or as far as roundings alone may take them; the loss, by what that can do to it (`loss_bound`).
        """
        if provider.dtype not in self._allowed:
            dtype = getattr(torch, provider.dtype)
            plain = _distance(self._outputs(dtype), self._exact)
            self._allowed[provider.dtype] = max(_TIMES_PLAIN * plain, self._rounded(dtype))
        distance, exact = self._allowed[provider.dtype], self._exact
        if self._training:
            what, off = "the loss", abs(float(result) - float(bce_dice(exact, self._target)))
            allowed = loss_bound(distance, exact, self._target)
        else:
            what, off, allowed = "the outputs, relative", _distance(result[-1:].double(), exact), distance
        if not off <= allowed:  # NaN is not.
            raise AssertionError(f"{provider.name}: distance to float64 of {what}: {off:.2e}, allowed {allowed:.2e}")
        return off

    def _rounded(self, dtype: torch.dtype) -> float:
        """The relative distance that roundings alone may cause: of the float64 net, each layer's result off at random.

        A convolution's by as much as `fastunet.testing` grants its sum and its result, a norm's by its result's
        rounding. A norm of few values magnifies what came in; how much, only the net itself tells.
        """
        generator = torch.Generator(self._x.device).manual_seed(0)

        def disturb(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
            size = UNIT_ROUNDOFF[dtype]
            if isinstance(module, nn.Conv2d):
                size += 6 * module.weight[0].numel() ** 0.5 * UNIT_ROUNDOFF[torch.float32]
            noise = torch.rand(result.shape, generator=generator, dtype=torch.float64, device=result.device)
            return result * (1 + size * (2 * noise - 1))

        net = self._model.to_reference().double()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d):
                module.register_forward_hook(disturb)
        with torch.no_grad():
            return _distance(net(self._x.double()), self._exact)

    def _outputs(self, dtype: torch.dtype) -> Tensor:
        """Of plain modules in that dtype (16 bits in training: under autocast), in float64."""
        amp = self._training and dtype in (torch.bfloat16, torch.float16)
        held = torch.float32 if amp else dtype
        net = self._model.to_reference().to(held)
        with torch.no_grad(), torch.autocast(self._x.device.type, dtype) if amp else nullcontext():
            return net(self._x.to(held)).double()


def loss_bound(distance: float, logits: Tensor, target: Tensor) -> float:
    """How far BCE + Dice may be off where the logits, float64 [N, C, H, W], are off by that relative 2-norm.

    With e the root mean square of the errors: the derivative of a pixel's cross entropy by its logit is at most 1, so
    that the mean is off by e at most; that of a channel's Dice is at most 2 / (sum p + sum t) by a probability, and so
    1 / (2 sum t) by a logit. The rest are float32 roundings of the sums.
    """
    e = distance * float(logits.square().mean().sqrt())
    pixels = target[0, 0].numel()
    of_dice = float((pixels / (2 * target.sum((2, 3)))).max())
    roundings = (6 * pixels**0.5 + 16) * UNIT_ROUNDOFF[torch.float32]
    return e * (1 + of_dice) + roundings * (float(bce_dice(logits, target)) + 1)
