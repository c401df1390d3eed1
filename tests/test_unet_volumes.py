"""The U-Net of volumes [N, C, D, H, W]: torch's own layers, of the same options, parameters and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unet_pair import assert_trains_alike, moved
from unet_weights import SMALL, assert_identical

import fastunet
from fastunet.checks import ConfigError, DataError, DtypeError, ShapeError
from fastunet.data import DataSummary
from fastunet.dispatch import VOLUMES
from fastunet.inference.export import Pipeline
from fastunet.reference import ReferenceUNet
from fastunet.train.weights import load_initial

# Each value of an option at least once.
OPTIONS: list[dict[str, Any]] = [
    {"norm": "batch", "upsample": "transpose", "activation": "relu", "head": None},
    {"norm": "instance", "upsample": "trilinear", "activation": "leaky_relu", "head": "softmax"},
    {"norm": None, "upsample": "transpose", "activation": "leaky_relu", "head": "sigmoid"},
    {"norm": "batch", "upsample": "trilinear", "activation": "leaky_relu", "head": "sigmoid"},
]


def net(**options: Any) -> fastunet.UNet:
    torch.manual_seed(0)
    return fastunet.UNet(1, 2, dims=3, **{"features": SMALL, **options})


def written_out(model: Any, x: Tensor) -> Tensor:
    """The net of batch norm, transposed convolutions and ReLU as torch's functions of its weights."""
    state = model.state_dict()

    def block(x: Tensor, prefix: str) -> Tensor:
        for index in (0, 3):
            norm = f"{prefix}double_conv.{index + 1}."
            statistics = (state[norm + name] for name in ("running_mean", "running_var", "weight", "bias"))
            y = F.conv3d(x, state[f"{prefix}double_conv.{index}.weight"], padding=1)
            x = F.batch_norm(y, *statistics, eps=1e-5).clamp(min=0)
        return x

    skips = [block(x, "inc.")]
    for level in (1, 2):
        skips.append(block(F.max_pool3d(skips[-1], 2), f"down{level}.maxpool_conv.1."))
    y = skips.pop()
    for level in (1, 2):
        up = F.conv_transpose3d(y, state[f"up{level}.up.weight"], state[f"up{level}.up.bias"], stride=2)
        skip = skips.pop()
        joined = torch.zeros(skip.shape[0], skip.shape[1] + up.shape[1], *skip.shape[2:], dtype=x.dtype)
        joined[:, : skip.shape[1]] = skip
        first = [(large - small) // 2 for large, small in zip(skip.shape[2:], up.shape[2:], strict=True)]
        inner = [slice(a, a + small) for a, small in zip(first, up.shape[2:], strict=True)]
        joined[(slice(None), slice(skip.shape[1], None), *inner)] = up
        y = block(joined, f"up{level}.conv.")
    return F.conv3d(y, state["outc.conv.weight"], state["outc.conv.bias"])


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 9, 14), (8, 7, 6)], ids=str)
@pytest.mark.parametrize("kind", [fastunet.UNet, ReferenceUNet])
def test_it_is_the_net_written_out(kind: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = moved(kind(1, 2, features=SMALL, dims=3)).double().eval()
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 2, *size)
        torch.testing.assert_close(y, written_out(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_it_trains_as_its_reference(options: dict[str, Any]) -> None:
    model = net(**options).double()
    assert type(model.to_reference()) is ReferenceUNet
    assert_trains_alike(model, model.to_reference(), torch.randn(2, 1, 9, 8, 11, dtype=torch.float64))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_same_parameters_as_in_two_dimensions(options: dict[str, Any]) -> None:
    """But for the kernels, which have one side more."""
    flat = {**options, "upsample": options["upsample"].replace("trilinear", "bilinear")}
    images, volumes = fastunet.UNet(1, 2, features=SMALL, **flat).state_dict(), net(**options).state_dict()
    assert list(volumes) == list(images)
    for name, t in images.items():
        sides = 1 if t.dim() < 4 else t.shape[-1]
        assert volumes[name].shape == (t.shape if t.dim() < 4 else (*t.shape, sides)), name


# --- files ---


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_saved_net_is_read_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    model = net(**options)
    model.save_pretrained(tmp_path / "net")
    loaded = fastunet.UNet.from_pretrained(tmp_path / "net")
    assert loaded.config["dims"] == 3
    assert_identical(loaded, model)


def test_weights_alone_tell_the_dimensions() -> None:
    found = fastunet.UNet.from_pretrained(net(upsample="trilinear").state_dict())
    assert (found.config["dims"], found.config["upsample"]) == (3, "trilinear")
    assert fastunet.UNet.from_pretrained(fastunet.UNet(1, 2, features=SMALL).state_dict()).config["dims"] == 2
    with pytest.raises(ConfigError, match="dims: expected 3, as the weights have it, got 2"):
        fastunet.UNet.from_pretrained(net().state_dict(), dims=2)


def test_weights_of_both_kinds_are_refused() -> None:
    state = {**net().state_dict(), "outc.conv.weight": torch.zeros(2, 4, 1, 1)}
    with pytest.raises(DataError, match=r"outc\.conv\.weight: expected a 5-D tensor, got \[2, 4, 1, 1\]"):
        fastunet.UNet.from_pretrained(state)


# --- what is refused ---


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_what_is_no_volume_or_too_small_raises_with_what_is_expected(norm: str) -> None:
    model = net(norm=norm)
    with pytest.raises(ShapeError, match=r"input: expected a 5-D tensor \[N, C, D, H, W\], got \[1, 1, 8, 8\]"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"expected depth, height and width >= 4 \(2\*\*depth\), got 3x8x8"):
        model(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(DtypeError, match=r"expected a floating-point tensor, got torch\.uint8"):
        model(torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"input: expected a 4-D tensor \[N, C, H, W\], got \[1, 1, 8, 8, 8\]"):
        fastunet.UNet(1, 2, features=SMALL)(torch.zeros(1, 1, 8, 8, 8))


def test_one_voxel_at_the_bottom_has_no_statistics() -> None:
    with pytest.raises(ShapeError, match=r"expected depth, height or width >= 8 .*got 4x4x7"):
        net(norm="instance")(torch.zeros(1, 1, 4, 4, 7))
    assert net(norm="instance")(torch.zeros(1, 1, 4, 4, 8)).shape == (1, 2, 4, 4, 8)


SUMMARY = DataSummary(1, 1, 1, (0, 255), "uint8", (8, 8), (8, 8))
REFUSING: dict[str, Callable[[Any], Any]] = {
    "predict": lambda model: fastunet.predict(model, torch.zeros(1, 1, 16, 16, 16), tile=8),
    "export": lambda model: Pipeline(model, SUMMARY),
    "quantize": lambda model: fastunet.quantize(model, torch.zeros(1, 1, 8, 8, 8)),
    "graphed": fastunet.graphed,
    "tune": lambda model: fastunet.tune(model, torch.zeros(1, 1, 8, 8, 8)),
}


@pytest.mark.parametrize("what", REFUSING)
@pytest.mark.parametrize("within", [lambda m: m, nn.DataParallel], ids=["itself", "wrapped"])
def test_what_is_of_images_alone_says_so(what: str, within: Callable[[Any], Any]) -> None:
    model = net().eval()
    if what not in ("export", "quantize"):  # which are of a UNet, not of what is around one
        model = within(model)
    with pytest.raises(ConfigError, match=f"^{what}: expected a UNet of images .*, got dims=3: {VOLUMES}"):
        REFUSING[what](model)


def test_a_training_does_not_begin_with_weights_of_volumes(tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="init: expected weights of dims 2, got 3"):
        load_initial(fastunet.UNet(1, 2, features=SMALL), str(tmp_path))


# --- what says so ---


def test_explain_says_what_runs_it() -> None:
    rows = fastunet.explain(net(), torch.zeros(1, 1, 8, 8, 8)).rows
    kinds = [row.op for row in rows]
    assert sum("convolution" in kind for kind in kinds) == 13  # two in each of five blocks, two upsamplings, the head
    assert sum("max_pool" in kind for kind in kinds) == 2
    assert {(row.implementation, row.reason) for row in rows} == {("aten", VOLUMES)}
