"""fastunet.predict: activations, tiles, views, and leaving the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError, ShapeError
from fastunet.inference import evaluate, labels_of


class Local(nn.Module):
    """A 'model' that sees a 3x3 neighbourhood only, so that tiles can be exact inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.conv(x)


@pytest.mark.parametrize(("channels", "activation"), [(1, lambda z: z.sigmoid()), (3, lambda z: z.softmax(1))])
def test_probabilities_of_batch_and_single_image(channels: int, activation) -> None:
    model = Local(channels).train()
    image = torch.randn(2, 1, 9, 7)
    expected = activation(model.conv(image))
    torch.testing.assert_close(fastunet.predict(model, image), expected)
    torch.testing.assert_close(fastunet.predict(model, image[1]), expected[1])
    assert model.training
    assert not fastunet.predict(model, image).requires_grad


def test_a_models_own_head_is_not_applied_twice() -> None:
    model = fastunet.UNet(1, 1, features=(2, 4), head="sigmoid").eval()
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(fastunet.predict(model, image), expected, rtol=0, atol=0)


def test_tiles_agree_with_the_whole_but_at_their_edges() -> None:
    model = Local(1)
    image = torch.randn(1, 1, 70, 50)
    whole = fastunet.predict(model, image)
    tiled = fastunet.predict(model, image, tile=32, overlap=0.5)
    difference = (tiled - whole).abs()
    # A tile is wrong in its outermost pixels only, and weighs little there.
    assert 0 < (difference > 1e-5).float().mean() < 0.25
    assert difference.mean() < 0.01
    torch.testing.assert_close(fastunet.predict(model, image, tile=70), whole, rtol=0, atol=0)


def test_views_make_the_prediction_turn_with_the_image() -> None:
    model = Local(1)
    image = torch.randn(1, 1, 8, 6)
    result = fastunet.predict(model, image, tta=True)
    assert (fastunet.predict(model, image) - result).abs().max() > 1e-3
    for turns in range(4):
        turned = image.rot90(turns, (-2, -1)).flip(-1)
        back = fastunet.predict(model, turned, tta=True).flip(-1).rot90(-turns, (-2, -1))
        torch.testing.assert_close(back, result)


def test_bad_arguments() -> None:
    model = Local(1)
    with pytest.raises(ShapeError, match=r"expected \[C, H, W\] or \[N, C, H, W\], got \[4, 4\]"):
        fastunet.predict(model, torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="overlap: expected 0 <= overlap < 1, got 1"):
        fastunet.predict(model, torch.zeros(1, 4, 4), overlap=1.0)
    with pytest.raises(ConfigError, match="tile: expected at least 1 pixel or None, got 0"):
        fastunet.predict(model, torch.zeros(1, 4, 4), tile=0)


def test_the_mode_survives_an_error() -> None:
    model = fastunet.UNet(1, 1, features=(2, 4)).train()
    with pytest.raises(ShapeError):
        fastunet.predict(model, torch.zeros(1, 1, 1, 1))
    assert model.training


def test_labels() -> None:
    assert labels_of(torch.tensor([0.5, 0.6]).reshape(1, 1, 2)).tolist() == [[0, 1]]
    assert labels_of(torch.tensor([0.2, 0.5, 0.3]).reshape(3, 1, 1)).item() == 1


def test_evaluate_scores_what_is_predicted() -> None:
    model = Local(1)
    nn.init.zeros_(model.conv.weight)
    nn.init.ones_(model.conv.bias)  # everything is foreground
    labels = torch.tensor([[1, 1], [1, 0]])
    scores, predictions = evaluate(model, [(torch.zeros(1, 2, 2), labels)], ["background", "foreground"])
    assert predictions[0].tolist() == [[1, 1], [1, 1]]
    assert scores["dice"]["background"] == 0
    assert scores["dice"]["foreground"] == pytest.approx(6 / 7)
