"""Deep supervision: heads at lower levels that learn, are resumed, and are gone from what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopped_training import DEEP, killed, losses_of, stop_at
from torch import Tensor

import fastunet
from fastunet import UNet
from fastunet.data.labels import IGNORED
from fastunet.train.checkpoint import checkpoints
from fastunet.train.loop import train
from fastunet.train.loss import TrainingLoss
from fastunet.train.supervision import DeepLoss, DeeplySupervised, labels_at


@pytest.mark.parametrize("way", ["layers", "ops", "modules", "inference"])
@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
def test_levels_are_what_the_steps_up_give(way: str, upsample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = UNet(1, 2, features=(4, 4, 8, 8), upsample=upsample).double().train(way != "inference")
    x = torch.randn(2, 1, 37, 50, dtype=torch.float64)
    expected: list[Tensor] = []
    reference = net.to_reference()
    for up in reference.ups:
        up.register_forward_hook(lambda module, inputs, output: expected.append(output))
    if way == "modules":
        net.up2.register_forward_hook(lambda module, inputs, output: None)
    elif way != "inference":
        monkeypatch.setattr(net, "_way_by_size", lambda x, autocast: way)
    with torch.set_grad_enabled(net.training):
        y, levels = net.forward_levels(x)
    torch.testing.assert_close(y, reference(x))
    assert len(levels) == 2
    for level, right in zip(levels, expected, strict=False):
        torch.testing.assert_close(level, right)


@pytest.mark.parametrize("border", [0.0, 7.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_is_that_of_each_level_by_halved_weights(classes: int, border: float) -> None:
    """Of three levels 4/7, 2/7 and 1/7; classes and ignored pixels count at each, borders at the first."""
    torch.manual_seed(0)
    weights = torch.rand(max(classes, 2)) + 0.5
    labels = torch.randint(max(classes, 2), (2, 23, 36))
    labels[:, :5] = IGNORED
    outputs = [torch.randn(2, classes, 23 >> level, 36 >> level) for level in range(3)]
    plain, full = (TrainingLoss(classes, border_weight=w, ignored=True, weights=weights) for w in (0.0, border))
    halves, quarters = labels[:, 1:22:2, 1::2], labels[:, 2:20:4, 2::4]
    expected = (4 * full(outputs[0], labels) + 2 * plain(outputs[1], halves) + plain(outputs[2], quarters)) / 7
    torch.testing.assert_close(DeepLoss(full)(outputs, labels), expected)
    torch.testing.assert_close(DeepLoss(full)(outputs[:1], labels), full(outputs[0], labels))


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (4, 7)])
def test_labels_are_reduced_to_pixels_within_their_square(size: tuple[int, int]) -> None:
    rows = torch.arange(size[0])[None, :, None].expand(1, *size)
    for level in (1, 2):
        reduced = labels_at(rows, level)
        assert reduced.shape == (1, size[0] >> level, size[1] >> level)
        assert torch.equal(reduced[0, :, 0] >> level, torch.arange(size[0] >> level))


def test_every_head_gets_a_gradient_and_the_net_keeps_its_names() -> None:
    torch.manual_seed(0)
    net = UNet(1, 3, features=(4, 4, 8, 8, 8))
    names = list(net.state_dict())
    model = DeeplySupervised(net)
    labels = torch.randint(3, (2, 32, 32))
    DeepLoss(TrainingLoss(3))(model(torch.randn(2, 1, 32, 32)), labels).backward()
    assert list(net.state_dict()) == names
    assert [tuple(head.conv.weight.shape[:2]) for head in model.heads] == [(3, 4), (3, 8)]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name != "net.outc.conv.bias":  # three logits' may cancel
            assert parameter.grad.abs().max() > 0, name


def test_what_is_kept_is_the_plain_net(data: Path, tmp_path: Path) -> None:
    config = replace(DEEP, ema=0.5, val_fraction=0.0)
    losses_of(data, tmp_path / "run", config, stop=stop_at(5, killed))
    (*_, newest) = checkpoints(tmp_path / "run")
    begun = load_file(newest / "model.safetensors")
    train(None, tmp_path / "run", resume=True)
    trained = load_file(tmp_path / "run/checkpoint-000010/model.safetensors")
    heads = [key for key in trained if key.startswith("heads.")]
    assert len(heads) == 4
    assert not any(torch.equal(trained[key], begun[key]) for key in heads)
    plain = UNet(1, 1, features=config.features or ())
    assert set(load_file(tmp_path / "run/model.safetensors")) == set(plain.state_dict())
    segmenter = fastunet.load(tmp_path / "run")
    assert segmenter.predict(data / "images/cell_000.png").shape == (64, 64)


def test_in_half_precision_scores_are_those_of_the_precision(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net within the trained module is not cast by itself: those who call it see to it."""
    seen: list[torch.dtype] = []
    built = UNet._run

    def note(net: UNet, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        y = built(net, x, levels)
        seen.append(y.dtype)
        return y

    monkeypatch.setattr(UNet, "_run", note)
    train(data, tmp_path / "run", replace(DEEP, steps=1, precision="bf16"))
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16}
