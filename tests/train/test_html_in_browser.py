"""The HTML report as a user sees it, in headless Chromium: what is drawn, what moves, and that nothing is asked for."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import browser
import pytest

if browser.CHROMIUM is None:
    pytest.skip("needs Chromium, which apt-get install chromium brings", allow_module_level=True)

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from fastunet.inference.outputs import class_palette
from fastunet.train.html import write_html
from fastunet.train.report import Sample

WIDE, NARROW = 1280, 390
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# The opacity of each layer of each picture; all layers lie over each other, in their order.
OPACITIES = """
const opacities = () => all(".stack").map(each => Array.from(each.children, layer => +getComputedStyle(layer).opacity));
const places = all(".stack").map(each => Array.from(each.children, layer => layer.getBoundingClientRect().toJSON()));
"""


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_report_shows_all_of_a_run_and_asks_for_nothing(run: Path, tmp_path: Path, width: int) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    script = f"""
    all("summary")[2].click();
    const curves = all(".curves img").map(each => [each.src, each.getBoundingClientRect().width, each.naturalWidth]);
    return [innerWidth, {OVERFLOW}, curves, all("input").length, document.body.innerText];
    """
    shown, overflow, curves, sliders, text = browser.ask(run / "report.html", tmp_path, width, script)
    assert (shown, overflow, sliders) == (width, 0, len(metrics["images"]))
    for (source, broad, pixels), colour in zip(curves, ("#0072B2", "#009E73"), strict=True):
        assert broad >= 340, "large enough to be read"
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as curve:
            assert pixels == curve.width
            assert (np.asarray(curve.convert("RGB")) == np.round(np.array(to_rgb(colour)) * 255)).all(-1).any()
    for words in (*metrics["images"], f"{metrics['dice']['foreground']:.4f}", "border_weight"):
        assert words in text


def test_a_slider_goes_from_image_to_truth_to_prediction(run: Path, tmp_path: Path) -> None:
    script = f"""{OPACITIES}
    const slider = all("input")[0], seen = [opacities()];
    for (const value of [2, 1, 0, 0.5]) {{
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
      seen.push(opacities());
    }}
    for (const number of [2, 1, 0]) {{
      all(".ends button")[number].click();
      seen.push(opacities());
    }}
    return [seen, places, all(".stack img").map(each => each.src)];
    """
    seen, places, sources = browser.ask(run / "report.html", tmp_path, WIDE, script)
    image, truth, prediction = [1, 0, 0], [1, 1, 0], [1, 1, 1]
    assert [first for first, _ in seen] == [
        *(image, prediction, truth, image, [1, 0.5, 0]), *(prediction, truth, image)
    ]  # fmt: skip
    assert all(second == image for _, second in seen)
    assert all(layer == layers[0] and layer["width"] > 100 for layers in places for layer in layers)
    assert len(set(sources[:3])) == 3


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
    script = f"""
    const right = Math.max(...all("body *").map(each => each.getBoundingClientRect().right));
    return [{OVERFLOW}, right, all(".swatch").map(each => getComputedStyle(each).backgroundColor)];
    """
    overflow, right, legend = browser.ask(path, tmp_path / "profile", width, script)
    assert (overflow, right <= width) == (0, True)
    assert legend == ["rgb({}, {}, {})".format(*class_palette()[label]) for label in range(3)]


def test_a_page_that_asks_or_complains_is_found_out(tmp_path: Path) -> None:
    """What the tests above rely on."""
    path = tmp_path / "page.html"
    path.write_text("<img src='data:,'><img src='other.png'><script>console.error('here'); nothing()</script>")
    answer = browser.answer_of(path, tmp_path / "profile", WIDE, "return all('img').length")
    assert (answer["found"], answer["asked"]) == (2, ["file"])
    assert answer["complaints"] == ["here", "Uncaught ReferenceError: nothing is not defined"]
