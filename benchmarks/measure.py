"""One measurement: an op's parity, a layer's time, a net's time. Each gives a row for the report.

A layer or net is timed only after its results were compared with float64; one that is off has no time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet import dispatch
from fastunet.losses import BCEDiceLoss
from fastunet.testing import float32_precision

from . import parity
from .expected import Call
from .layers import Layer, meta_unet, unet_layers
from .timing import Quantiles, clock_of, interleave, sets_past_cache

# What layers and nets are timed in.
DTYPE = torch.bfloat16
DIRECTIONS = ("forward", "backward")
TASKS = ("inference", "training")
# Side of the images on which a net is compared with float64.
_PARITY_SIDE = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured: the device, the net UNet(in_channels, out_channels, features=features), its images.

    rounds: samples of each time. seconds: after which a timing takes no further sample.
    """

    device: str = "cuda"
    size: int = 512
    batch: int = 16
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    in_channels: int = 3
    out_channels: int = 2
    rounds: int = 50
    seconds: float = 3.0

    def layers(self) -> list[Layer]:
        """Of the net, for its images."""
        model = meta_unet(self.in_channels, self.out_channels, self.features)
        return unet_layers(model, self.batch, self.size, self.size)


@dataclass(frozen=True)
class Step:
    """One row to measure. kind "parity": name is the case's number, variant the number format; "layer": the layer and
    the direction; "net": the task.
    """

    kind: str
    name: str
    variant: str = ""


def all_steps(settings: Settings) -> list[Step]:
    """In the order of their worth, should the time not suffice for all."""
    cases = [str(i) for i in range(len(parity.cases()))]
    layers = [layer.name for layer in settings.layers()]
    formats = [name for name in parity.FORMATS if name != "tf32" or settings.device == "cuda"]
    steps = [Step("parity", case, formats[0]) for case in cases]
    steps += [Step("layer", name, DIRECTIONS[0]) for name in layers]
    steps += [Step("net", task) for task in TASKS]
    steps += [Step("layer", name, DIRECTIONS[1]) for name in layers]
    return steps + [Step("parity", case, name) for name in formats[1:] for case in cases]


def describe(settings: Settings, step: Step) -> Row:
    """The part of a step's row that is known beforehand."""
    row: Row = asdict(step)
    if step.kind == "parity":
        row["name"] = str(parity.cases()[int(step.name)])
    if step.kind == "layer":
        layer = _layer(settings, step.name)
        row["op"], row["shapes"] = layer.op, {name: list(shape) for name, shape in layer.shapes.items()}
        row["flops"] = layer.flops if step.variant == "forward" else layer.backward_flops
    if step.kind == "net":
        work = [(layer.flops, layer.flops + layer.backward_flops) for layer in settings.layers()]
        row["flops"] = sum(flops[TASKS.index(step.name)] for flops in work)
    return row


def _layer(settings: Settings, name: str) -> Layer:
    return next(layer for layer in settings.layers() if layer.name == name)


def run_step(settings: Settings, step: Step) -> Row:
    """Measure: the row, with "status" "ok" or "parity failed" and a "reason". Errors of the op pass through."""
    row = describe(settings, step)
    measure = {"parity": _parity, "layer": _layer_times, "net": _net_times}[step.kind]
    try:
        with float32_precision("tf32" if step.variant == "tf32" else "ieee"):
            found = measure(settings, step, row)
    except AssertionError as error:
        return row | {"status": "parity failed", "reason": str(error)}
    return row | {"status": "ok", "reason": ""} | found


def backends_for(op: str, device: torch.device, dtype: torch.dtype = DTYPE) -> tuple[list[str], str]:
    """Under which backends to run a public op, ours first, and why "triton" is not among them."""
    obstacle = dispatch.triton_obstacle(device, dtype)
    if obstacle is not None:
        return ["aten"], obstacle
    with fastunet.backend("triton"):
        choice = parity.implementation_of(op, dtype, device)
    return (["triton", "aten"], "") if choice.implementation == "triton" else (["aten"], choice.reason)


def _parity(settings: Settings, step: Step, row: Row) -> Row:
    device, case = torch.device(settings.device), parity.cases()[int(step.name)]
    dtype, allow_tf32 = parity.FORMATS[step.variant]
    (ours, *_), reason = backends_for(case.op, device, dtype)
    # Known before the check, so that a failing row has it too.
    row["implementation"], row["why_no_triton"] = ours, reason
    with fastunet.backend(ours):
        parity.check(case, dtype, device, allow_tf32=allow_tf32)
    return {}


# --- layers ---


def _layer_times(settings: Settings, step: Step, row: Row) -> Row:
    device, layer = torch.device(settings.device), _layer(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device)
    is_backward = step.variant == "backward"
    inputs = _device_inputs(layer, device)
    with fastunet.backend(backends[0]):
        _check_last_image(layer, inputs, backward=is_backward)
    copies = sets_past_cache(list(inputs.values()), device)
    sets = [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in range(copies - 1))]
    prepare = _backward_run if is_backward else _forward_run
    runs = {backend: [prepare(layer, backend, one) for one in sets] for backend in backends}
    return _timed(settings, runs, row["flops"])


def _device_inputs(layer: Layer, device: torch.device) -> dict[str, Tensor]:
    """As parity.make_inputs, made on the device, where it takes no time."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for name, shape in layer.shapes.items():
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        t = torch.empty(shape, dtype=DTYPE, device=device, memory_format=format)
        inputs[name] = t.normal_(0, parity.scale_of(name, shape), generator=generator)
    return inputs


def _check_last_image(layer: Layer, inputs: dict[str, Tensor], *, backward: bool) -> None:
    """AssertionError unless the last image of the batch comes out right, and the gradients of it alone.

    Only its cotangents are not zero, so that the parameters' gradients are those of one image, whatever the batch.
    """
    leaves = _leaves(layer, inputs) if backward else inputs
    with torch.set_grad_enabled(backward):
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [_last_only(torch.randn_like(y)) for y in outputs] if backward else []
    actual = parity.results_of(outputs, leaves, cotangents)
    last = {name: t[-1:] if _is_image(name) else t for name, t in actual.items()}
    images = {name: t[-1:] if _is_image(name) else t for name, t in inputs.items()}
    call = Call(layer.op, images, {}, {}, [g[-1:] for g in cotangents], **parity.how(layer.op, last))
    parity.compare(last, call, without=[] if layer.input_has_grad else ["grad x"])


def _is_image(name: str) -> bool:
    return "weight" not in name and "bias" not in name


def _last_only(cotangent: Tensor) -> Tensor:
    cotangent[:-1] = 0
    return cotangent


def _leaves(layer: Layer, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(layer.input_has_grad or name != "x") for name, t in inputs.items()}


def _forward_run(layer: Layer, backend: str, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), fastunet.backend(backend):
            parity.run_op(layer.op, inputs, {}, {})

    return run


def _backward_run(layer: Layer, backend: str, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    leaves = _leaves(layer, inputs)
    with fastunet.backend(backend):
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [torch.randn_like(y) for y in outputs]
    wanted = [t for t in leaves.values() if t.requires_grad]

    def run() -> None:
        with fastunet.backend(backend):
            torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return run


def _timed(settings: Settings, runs: Mapping[str, list[Callable[[], Any]]], flops: int) -> Row:
    """The times of each backend's runs, and how many times as long the last one's takes as the first one's."""
    torch.backends.cudnn.benchmark = True
    try:
        clock = clock_of(torch.device(settings.device))
        times = interleave(runs, clock, rounds=settings.rounds, seconds=settings.seconds)
    finally:
        torch.backends.cudnn.benchmark = False  # It would try every algorithm for the float64 references as well.
    row: Row = {"times": {name: _time_row(quantiles, flops) for name, quantiles in times.items()}}
    if len(times) > 1:
        row["speedup"] = times["aten"].median / times["triton"].median
    return row


def _time_row(quantiles: Quantiles, flops: int) -> Row:
    seconds = {f"{name}_ms": 1e3 * getattr(quantiles, name) for name in ("median", "p10", "p90")}
    return {**seconds, "samples": quantiles.samples, "tflops": flops / quantiles.median / 1e12}


# --- whole nets ---


def _net_times(settings: Settings, step: Step, row: Row) -> Row:
    device = torch.device(settings.device)
    # Of the net's ops, the convolution decides: where it has no kernel that runs here, there is nothing to compare.
    backends, row["why_no_triton"] = backends_for("conv3x3_batch_norm_relu", device)
    torch.manual_seed(0)
    model = fastunet.UNet(settings.in_channels, settings.out_channels, features=settings.features).to(device)
    row["parity"] = _check_net(settings, model, backends[0], training=step.name == "training")
    make = _training_run if step.name == "training" else _inference_run
    runs = {backend: make(settings, copy.deepcopy(model), backend) for backend in backends}
    measured = _timed(settings, {backend: [run] for backend, run in runs.items()}, row["flops"])
    for backend, times in measured["times"].items():
        times["images_per_s"] = settings.batch / times["median_ms"] * 1e3
        times["peak_bytes"] = _peak_bytes(runs[backend], device)
    return measured


def _inference_run(settings: Settings, model: nn.Module, backend: str) -> Callable[[], Any]:
    model = model.eval().to(DTYPE)
    x = _images(settings, settings.batch, settings.size).to(DTYPE)

    def run() -> None:
        with torch.no_grad(), fastunet.backend(backend):
            model(x)

    return run


def _training_run(settings: Settings, model: nn.Module, backend: str) -> Callable[[], Any]:
    model.train()
    x = _images(settings, settings.batch, settings.size)
    target = _target(settings, x)
    loss = BCEDiceLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=x.is_cuda)

    def run() -> None:
        with fastunet.backend(backend):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, DTYPE):
                logits = model(x)
            loss(logits, target).backward()
            optimizer.step()

    return run


def _images(settings: Settings, batch: int, side: int) -> Tensor:
    x = torch.randn(batch, settings.in_channels, side, side, device=settings.device)
    return x.contiguous(memory_format=torch.channels_last)


def _target(settings: Settings, x: Tensor) -> Tensor:
    shape = (x.shape[0], settings.out_channels, *x.shape[2:])
    return torch.randint(0, 2, shape, device=x.device).float().contiguous(memory_format=torch.channels_last)


def _check_net(settings: Settings, model: fastunet.UNet, backend: str, *, training: bool) -> Row:
    """AssertionError unless the net is at most twice as far from float64 as the same net in plain torch modules.

    Distances are relative, in the 2-norm: of the outputs, in training of all gradients. Both nets round in the same
    dtype; ours rounds no more often.
    """
    x = _images(settings, 2, min(settings.size, _PARITY_SIDE))
    target = _target(settings, x)
    twin = model.to_reference()
    with fastunet.backend("aten"):  # The loss is an op of ours in all three.
        exact = _result(copy.deepcopy(twin).double(), x.double(), target.double(), training)
        plain = _distance(_result(twin, x, target, training), exact)
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


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one run takes beside what was allocated before it; None on a CPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
