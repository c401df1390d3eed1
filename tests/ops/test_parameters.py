"""fastunet.UNet's parameters under what torch does to parameters, after an inference has packed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import fastunet
from fastunet.reference import ReferenceUNet
from fastunet.testing import assert_within

SIZES: dict[str, Any] = {"in_channels": 1, "out_channels": 2, "features": (8, 32, 64)}  # weights below 64 KiB and above
Net = fastunet.UNet


def image() -> Tensor:
    return torch.randn(2, 1, 21, 16, generator=torch.Generator().manual_seed(1))


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def pruned(model: Net) -> None:
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    prune.global_unstructured([(m, "weight") for m in convolutions], prune.L1Unstructured, amount=0.3)
    for module in convolutions:
        prune.l1_unstructured(module, "weight", 0.3)
    with torch.no_grad():
        model(image())
    for module in convolutions:
        prune.remove(module, "weight")


def swapped(model: Net) -> None:
    other = copy.deepcopy(model)
    scale(other)
    for own, given in zip(model.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(own, given)


def converted_by_swaps(model: Net) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict({name: t * 1.1 if t.is_floating_point() else t for name, t in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def shared(model: Net) -> None:
    model.share_memory()
    with torch.no_grad():
        model(image())
    scale(model)


def copied(model: Net) -> Net:
    copied = copy.deepcopy(model)
    scale(copied)
    return copied


CHANGES: dict[str, Callable[[Net], Any]] = {
    "pruning": pruned,
    "swap_tensors": swapped,
    "conversion by swaps": converted_by_swaps,
    "shared memory": shared,
    "deepcopy": copied,
}


def small_net() -> Net:
    torch.manual_seed(0)
    return Net(**SIZES).eval()


def assert_as_reference(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Of the weights in state, to a few times what float32 does to the reference model itself."""
    x, found = image(), []
    for dtype in (torch.float32, torch.float64):
        reference = ReferenceUNet(**SIZES).to(dtype).eval()
        reference.load_state_dict(state)
        found.append(reference(x.to(dtype)).detach().double())
    tolerance = 8 * float((found[0] - found[1]).abs().max())
    with torch.no_grad():
        inference = model(x)
    for y in (inference, model(x).detach()):
        assert_within(y, found[1], tolerance)


@pytest.mark.parametrize("change", CHANGES)
def test_after_an_inference(change: str) -> None:
    model = small_net()
    with torch.no_grad():
        model(image())
    result = CHANGES[change](model)
    model = result if isinstance(result, nn.Module) else model
    assert_as_reference(model.eval(), model.state_dict())


def test_contiguous_and_so_are_gradients() -> None:
    model = small_net().train()
    y = model(image())
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous() and p.grad is not None and p.grad.is_contiguous() for p in model.parameters())


def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP frees the storages of whole weights after use, and fills them again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), small_net()
        with torch.no_grad():
            model(image())
        for part in (model.inc, *model.downs, *model.ups, model):
            fully_shard(part, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            y = model(image())
            y.backward(torch.randn_like(y))
            optimizer.step()
            optimizer.zero_grad()
            state = {name: getattr(t, "full_tensor", t.clone)() for name, t in model.state_dict().items()}
            assert_as_reference(model, state)
    finally:
        torch.distributed.destroy_process_group()


def test_built_of_fake_tensors() -> None:
    with FakeTensorMode():
        model = small_net().train()
        model(image_like := torch.empty(2, 1, 21, 16)).sum().backward()
        with torch.no_grad():
            assert model.eval()(image_like).shape == (2, 2, 21, 16)
    assert all(p.grad is not None for p in model.parameters())
