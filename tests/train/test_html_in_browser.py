"""The HTML report as a user sees it, in headless Chromium: what is drawn, what moves, and that nothing is asked for."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import browser
import pytest

pytest.importorskip("jinja2", reason="needs the extra train")
if browser.CHROMIUM is None:
    pytest.skip("needs Chromium, which apt-get install chromium brings", allow_module_level=True)

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from fastunet.train.html import write_html
from fastunet.train.report import Sample

WIDE, NARROW = 1280, 390
SLIDERS = "document.querySelectorAll('input[type=range]')"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LAYERS = "Array.from(document.querySelectorAll('.stack')[0].querySelectorAll('img'))"


def at_pixel_centres(shown: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Take from an enlarged picture [H, W, 3] one value for each pixel of the original."""
    rows, columns = (
        ((np.arange(n) + 0.5) * length / n).astype(int) for n, length in zip(size, shown.shape[:2], strict=True)
    )
    return shown[rows][:, columns].astype(int)


def holds(shown: np.ndarray, colour: str) -> bool:
    """Whether a colour occurs, or what a thin line of it becomes where it is drawn smaller."""
    return bool((np.abs(shown - np.array(to_rgb(colour)) * 255).max(-1) <= 64).any())


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_report_shows_all_of_a_run_and_asks_for_nothing(run: Path, tmp_path: Path, width: int) -> None:
    path, metrics = run / "report.html", json.loads((run / "metrics.json").read_text())
    with browser.Page(path, tmp_path, width) as page:
        assert page.value_of(f"[innerWidth, {OVERFLOW}]") == [width, 0]
        curves = [page.picture(f"document.querySelectorAll('.curves img')[{index}]") for index in range(2)]
        assert holds(curves[0], "#0072B2")  # the loss
        assert holds(curves[1], "#009E73")  # the Dice
        assert min(curve.shape[1] for curve in curves) >= 340, "large enough to be read"
        table = page.value_of("document.querySelector('.scores').innerText")
        assert f"{metrics['dice']['foreground']:.4f}" in table
        for name in metrics["images"]:
            assert name in page.value_of("document.querySelector('.images').innerText")
        assert page.value_of(f"{SLIDERS}.length") == len(metrics["images"])
        page.click("document.querySelectorAll('summary')[2]")
        assert "border_weight" in page.value_of("document.body.innerText")
        assert (page.requests, page.complaints) == ([path.as_uri()], [])


def test_a_slider_goes_from_image_to_truth_to_prediction(run: Path, tmp_path: Path) -> None:
    stack, slider = "document.querySelector('.stack')", f"{SLIDERS}[0]"
    with browser.Page(run / "report.html", tmp_path, WIDE) as page:
        layers = []
        for source in page.value_of(f"{LAYERS}.map(each => each.src)"):
            with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
                layers.append(np.asarray(picture).astype(int))
        image, truth, prediction = layers
        assert len({each.tobytes() for each in layers}) == 3
        others = page.picture("document.querySelectorAll('.stack')[1]")

        def shown() -> np.ndarray:
            return at_pixel_centres(page.picture(stack), image.shape[:2])

        assert np.array_equal(shown(), image)
        for share, expected in ((1.0, prediction), (0.5, truth), (0.0, image)):
            page.click(slider, min(max(share, 0.01), 0.99))
            assert np.array_equal(shown(), expected)
        page.click(slider, 0.27)
        opacity = float(page.value_of(f"{slider}.value"))
        assert 0.3 < opacity < 0.7
        assert np.abs(shown() - (image + opacity * (truth - image))).max() <= 2
        for number, expected in ((2, prediction), (1, truth), (0, image)):
            page.click(f"document.querySelectorAll('.ends button')[{number}]")
            assert np.array_equal(shown(), expected)
        assert np.array_equal(page.picture("document.querySelectorAll('.stack')[1]"), others)
        assert page.complaints == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_long_names_wide_images_and_classes_fit(tmp_path: Path, width: int) -> None:
    """In a narrow window, too, nothing is cut off; a legend has the colours of the classes."""
    name, classes = "x" * 150, ["background", "tree", "bird"]
    truth = np.zeros((40, 900), np.uint8)
    truth[:, 300:600], truth[:, 600:] = 1, 2
    sample = Sample(name, np.zeros((40, 900, 3), np.uint8), truth, truth)
    scores = {"weights": "step 1", "images": [name], "dice": dict.fromkeys(classes, 1.0)}
    history = [{"step": 1, "minutes": 0.5, "train_loss": 1.0, "val_dice": 0.5}]
    about = {"data and run": {"data": f"/{name}/{name}", "training images": ", ".join([name] * 3)}}
    path = tmp_path / "report.html"
    metrics = {**scores, "iou": scores["dice"]}
    write_html(path, history, [(sample, 1.0)], metrics, [(name, 1.0)], about, classes)
    with browser.Page(path, tmp_path / "profile", width) as page:
        assert page.value_of(OVERFLOW) == 0
        right = "Array.from(document.body.querySelectorAll('*')).map(each => each.getBoundingClientRect().right)"
        assert max(page.value_of(right)) <= width
        page.click(f"{SLIDERS}[0]")
        colours = at_pixel_centres(page.picture("document.querySelector('.stack')"), (1, 3))[0]
        for label, colour in enumerate(colours):
            legend = page.value_of(f"getComputedStyle(document.querySelectorAll('.swatch')[{label}]).backgroundColor")
            assert legend == "rgb({}, {}, {})".format(*colour)


def test_a_page_that_asks_or_complains_is_found_out(tmp_path: Path) -> None:
    """What the tests above rely on."""
    path = tmp_path / "page.html"
    path.write_text("<img src='data:,'><img src='other.png'><script>console.error('here'); nothing()</script>")
    with browser.Page(path, tmp_path / "profile", WIDE) as page:
        assert page.requests == [path.as_uri(), (tmp_path / "other.png").as_uri()]
        for text in ('"here"', "nothing is not defined", "ERR_FILE_NOT_FOUND"):
            assert text in " ".join(page.complaints)
