"""The HTML report: that it parses, needs no network, and shows what was trained on what."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from fastunet.inference.outputs import class_palette
from fastunet.train.html import write_html
from fastunet.train.report import Sample

VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """Tags must nest; texts and images are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[tuple[str, np.ndarray]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            source = values["src"] or ""
            assert source.startswith("data:image/png;base64,")
            with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
                self.images.append((values["alt"] or "", np.asarray(picture)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_a_page_has_layers_to_slide_between_and_escapes_names(tmp_path: Path) -> None:
    truth, prediction = np.array([[0, 1], [0, 0]], np.uint8), np.array([[0, 1], [2, 0]], np.uint8)
    sample = Sample("<b>&.png", np.arange(4, dtype=np.uint8).reshape(2, 2, 1), truth, prediction)
    history = [{"step": 1, "minutes": 0.5, "train_loss": 1.0, "val_dice": 0.5}]
    metrics = {"weights": "step 1", "images": ["a"], "dice": {"x": 0.25}, "iou": {"x": 0.125}}
    write_html(
        tmp_path / "report.html",
        history,
        [(sample, 0.5)],
        metrics,
        [("<b>&", 0.5), ("c", math.nan)],
        {"data": {"from": "/a<b"}},
        ["w", "x", "y"],
    )
    page = Page((tmp_path / "report.html").read_text())
    assert page.cells == ["x", "0.2500", "0.1250", "<b>&", "0.5000", "c", "ignored", "from", "/a<b"]
    curves, layers = page.images[:2], page.images[2:]
    assert [name for name, _ in curves] == ["Training loss against steps", "Validation Dice against steps"]
    assert [name for name, _ in layers] == ["image", "truth", "prediction"]
    assert layers[0][1][1, 1].tolist() == [255, 255, 255]
    for (_, shown), labels in zip(layers[1:], (truth, prediction), strict=True):
        assert np.array_equal(shown, class_palette()[labels])


def test_the_report_of_a_run_needs_no_network(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    page = Page(text)
    metrics = json.loads((run / "metrics.json").read_text())
    for name in metrics["images"]:
        assert name in page.cells
    assert f"{metrics['dice']['foreground']:.4f}" in page.cells
    assert len(page.images) == 2 + 3 * len(metrics["images"])
    assert {"lr", "0.001", "features", "4, 8"} <= set(page.cells)
