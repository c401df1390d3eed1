"""A whole net, ready to be timed: inference or a training step, compared with float64 beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.losses import BCEDiceLoss

from .cases import Settings
from .results import Row
from .steps import DTYPE

# Side of the images on which a net is compared with float64.
_PARITY_SIDE = 64


def make_net(settings: Settings) -> fastunet.UNet:
    """The settings' net on their device, with the same weights every time."""
    torch.manual_seed(0)
    model = fastunet.UNet(settings.in_channels, settings.out_channels, features=settings.features)
    return model.to(settings.device)


def prepare_net(
    settings: Settings, model: fastunet.UNet, backends: Sequence[str], *, training: bool
) -> tuple[Row, dict[str, Callable[[], Any]]]:
    """The distances to float64, and by backend one call of the net's inference, or one training step, on copies.

    AssertionError unless the first backend's results are right.
    """
    distances = check_net(settings, model, backends[0], training=training)
    make = training_run if training else inference_run
    runs = {backend: make(settings, copy.deepcopy(model), backend) for backend in backends}
    return distances, runs | (_without(settings, model, training=training) if backends[0] == "triton" else {})


def _without(settings: Settings, model: fastunet.UNet, *, training: bool) -> dict[str, Callable[[], Any]]:
    """The kernels' runs without what can be left out: in training, outputs made anew; in inference, steps up as one."""
    model = copy.deepcopy(model)
    if training:
        run = training_run(settings, model, "triton")

        def run_keeping() -> None:
            with fastunet.recomputing(False):
                run()

        return {"triton, outputs kept": run_keeping}
    for up in model.ups:
        up.folds_upsampling = False
    return {"triton, steps up in two": inference_run(settings, model, "triton")}


def inference_run(settings: Settings, model: nn.Module, backend: str) -> Callable[[], Any]:
    """One call of the model, which becomes bfloat16, on a batch of random images."""
    model = model.eval().to(DTYPE)
    x = images(settings, settings.batch, settings.size).to(DTYPE)

    def run() -> None:
        with torch.no_grad(), fastunet.backend(backend):
            model(x)

    return run


def training_run(settings: Settings, model: nn.Module, backend: str) -> Callable[[], Any]:
    """One step of AdamW on BCEDiceLoss under autocast: what `fastunet train` does with a batch."""
    model.train()
    x = images(settings, settings.batch, settings.size)
    target = target_for(settings, x)
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
