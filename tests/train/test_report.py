"""The report: what its pictures show, and that it is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fastunet.inference.outputs import class_palette, displayable
from fastunet.train.report import ERROR_COLOURS, Sample, write_report

HISTORY: list[dict[str, Any]] = [
    {"step": 10, "minutes": 0.5, "train_loss": 1.5},
    {"step": 20, "minutes": 1.0, "train_loss": 0.75, "val_dice": 0.6},
    {"step": 30, "minutes": 1.5, "train_loss": float("nan"), "val_dice": 0.5},
]
# One pixel each: found, nothing there, too much, missed.
TRUTH = np.array([[1, 0], [0, 1]])
PREDICTION = np.array([[1, 0], [1, 0]])


def make_sample(shape: tuple[int, ...] = (24, 32, 1), classes: int = 2, dtype: str = "uint8") -> Sample:
    generator = np.random.default_rng(0)
    image = (generator.random(shape) * 200).astype(dtype)
    truth, prediction = generator.integers(0, classes, (2, *shape[:2]))
    return Sample("cell_000.png", image, truth, prediction)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in order, which are not drawn."""
    seen: list[Figure] = []

    def save(self: Figure, file: Path, **options: Any) -> None:
        assert file.name != "report.png", "a report appears under its name when it is complete"
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", save)
    return seen


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def panels(figure: Figure) -> dict[str, np.ndarray]:
    """The pictures of the figure, by title."""
    return {axes.get_title(): axes.images[0].get_array() for axes in figure.get_axes() if axes.images}


def test_curves_show_what_was_recorded(tmp_path: Path, figures: list[Figure]) -> None:
    write_report(tmp_path / "report.png", HISTORY, [])
    loss, dice = figures[0].get_axes()
    assert loss.get_title() == "training loss"
    assert loss.lines[0].get_xydata().tolist() == [[10, 1.5], [20, 0.75]]
    assert dice.get_title() == "validation Dice: best 0.600, last 0.500"
    assert dice.lines[0].get_xydata().tolist() == [[20, 0.6], [30, 0.5]]
    assert loss.get_xlabel() == dice.get_xlabel() == "steps (1.5 minutes in all)"
    assert loss.get_xlim() == dice.get_xlim()


@pytest.mark.parametrize("losses", [(1.64, 1.63), (1.5, 0.5), (-0.5, -0.75), (0.0, 0.0)])
def test_a_curve_lies_within_its_axes(losses: tuple[float, float], tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{"step": step, "minutes": 1.0, "train_loss": loss} for step, loss in enumerate(losses, 1)]
    write_report(tmp_path / "report.png", rows, [])
    low, high = figures[0].get_axes()[0].get_ylim()
    assert low <= min(0.0, *losses)
    assert max(losses) + 0.02 * (high - low) < high


@pytest.mark.parametrize("rows", [0, 1])
def test_a_history_of_no_or_one_row_is_drawn(tmp_path: Path, figures: list[Figure], rows: int) -> None:
    write_report(tmp_path / "report.png", HISTORY[:rows], [])
    assert texts(figures[0]).count("nothing recorded") == 2 - rows


def test_pictures_show_truth_prediction_and_each_kind_of_error(tmp_path: Path, figures: list[Figure]) -> None:
    image = np.zeros((2, 2, 1), np.uint16)
    write_report(tmp_path / "report.png", HISTORY, [Sample("a.tif", image, TRUTH, PREDICTION)])
    shown = panels(figures[0])
    assert list(shown) == ["a.tif", "truth", "prediction: Dice 0.500", "errors"]
    white = class_palette()[1] / 255
    assert shown["truth"].tolist() == [[list(white), [0, 0, 0]], [[0, 0, 0], list(white)]]
    assert shown["prediction: Dice 0.500"].tolist() == [[list(white), [0, 0, 0]], [list(white), [0, 0, 0]]]
    # On a black image a tint is its colour times its opacity.
    found, too_much, missed, _ = (np.array(to_rgb(colour)) * opacity for colour, opacity in ERROR_COLOURS.values())
    np.testing.assert_allclose(shown["errors"], [[found, [0, 0, 0]], [too_much, missed]])
    for label in list(ERROR_COLOURS)[:3]:
        assert label in texts(figures[0])
    assert "wrong class" not in texts(figures[0])


def test_several_classes_get_colours_names_and_a_colour_for_confusion(tmp_path: Path, figures: list[Figure]) -> None:
    truth, prediction = np.array([[0, 1, 2]]), np.array([[0, 2, 2]])
    sample = Sample("a.png", np.zeros((1, 3, 3), np.uint8), truth, prediction)
    write_report(tmp_path / "report.png", HISTORY, [sample], ["sky", "tree", "bird"])
    shown = panels(figures[0])
    mean_dice = (0 + 2 / 3) / 2
    assert f"prediction: Dice {mean_dice:.3f}" in shown
    assert len({tuple(colour) for colour in shown["truth"][0]}) == 3
    colour, opacity = ERROR_COLOURS["wrong class"]
    np.testing.assert_allclose(shown["errors"][0, 1], np.array(to_rgb(colour)) * opacity)
    assert {"sky", "tree", "bird", "wrong class"} <= set(texts(figures[0]))


def test_any_image_can_be_shown(tmp_path: Path) -> None:
    """RGB, many channels, very tall and very wide ones, and more classes than colours; nothing of pyplot's changes."""
    figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    rgb, many = make_sample((24, 32, 3)), make_sample((24, 32, 5), dtype="uint16")
    tall, wide = make_sample((200, 20, 1), dtype="float32"), make_sample((20, 300, 2))
    names = [f"class {label}" for label in range(12)]
    write_report(tmp_path / "report.png", HISTORY, [rgb, many, tall, wide, make_sample(classes=12)], names)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 1320
        assert 500 < picture.size[1] < 3000
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_large_pictures_are_thinned_but_scored_whole(tmp_path: Path, figures: list[Figure]) -> None:
    truth = np.zeros((2500, 600), np.uint8)
    truth[:, ::2] = 1
    sample = Sample("a.png", np.zeros((2500, 600, 3), np.uint8), truth, np.ones_like(truth))
    write_report(tmp_path / "report.png", HISTORY, [sample])
    shown = panels(figures[0])
    assert {picture.shape[:2] for picture in shown.values()} == {(834, 200)}
    assert "prediction: Dice 0.667" in shown


def test_a_picture_of_which_nothing_counts_has_no_score(tmp_path: Path, figures: list[Figure]) -> None:
    ignored = np.full_like(TRUTH, 255)
    image = np.zeros((*TRUTH.shape, 1), np.uint8)
    samples = [Sample("a.png", image, ignored, PREDICTION), Sample("b.png", image, TRUTH, PREDICTION)]
    write_report(tmp_path / "report.png", HISTORY, samples)
    assert [text.partition(":")[1] for text in texts(figures[0]) if text.startswith("prediction")] == ["", ":"]


def test_what_is_beyond_the_classes_is_no_error(tmp_path: Path, figures: list[Figure]) -> None:
    truth, prediction = np.array([[1, 255], [255, 0]], np.uint8), np.array([[1, 1], [0, 0]], np.uint8)
    write_report(tmp_path / "report.png", HISTORY, [Sample("a.png", np.zeros((2, 2, 1), np.uint8), truth, prediction)])
    shown = panels(figures[0])
    assert "prediction: Dice 1.000" in shown
    assert (shown["errors"][0, 1] == 0).all()


def test_images_are_stretched_to_their_own_range() -> None:
    ramp = np.linspace(1000, 1100, 1001).reshape(7, 143, 1).astype(np.float32)
    shown = displayable(ramp)
    assert shown.shape == (7, 143, 3)
    assert (shown.min(), shown.max()) == (0, 1)
    np.testing.assert_allclose(np.median(shown), 0.5, atol=0.01)
    assert (displayable(np.full((2, 2, 1), 9, np.uint8)) == 0).all()
