"""A training run as one HTML file that needs no network: curves, scores, and images with truth and prediction."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from fastunet.files import written_whole
from fastunet.train.report import CURVES_HEIGHT, DPI, WIDTH, Sample, colour_labels, displayable, draw_curves, thinned

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; width: 46%; margin: 0 2% 2em 0; vertical-align: top; }
.stack { position: relative; }
.stack img { width: 100%; display: block; image-rendering: pixelated; }
.stack img + img { position: absolute; top: 0; left: 0; opacity: 0; }
input[type=range] { width: 100%; }
.ends { display: flex; justify-content: space-between; font-size: 13px; color: #555; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Weights: {{ metrics.weights }}.</p>
<img alt="Training loss and validation Dice against steps" style="width: 100%" src="{{ curves }}">
{% if metrics.dice is defined %}
<h2>Scores of {{ metrics.images | length }} images kept out of training</h2>
<table class="scores">
<tr><th>class</th><th>Dice</th><th>IoU</th></tr>
{% for name, dice in metrics.dice.items() %}
<tr><td>{{ name }}</td>
<td class="number">{{ "%.4f" % dice }}</td><td class="number">{{ "%.4f" % metrics.iou[name] }}</td></tr>
{% endfor %}
</table>
{% endif %}
<h2>{{ heading }}</h2>
{% for picture in pictures %}
<figure>
<figcaption>{{ picture.name }}: Dice {{ "%.4f" % picture.dice }}</figcaption>
<div class="stack">
{% for layer in picture.layers %}<img alt="{{ layer[0] }}" src="{{ layer[1] }}">
{% endfor %}</div>
<input type="range" min="0" max="2" step="0.05" value="0" aria-label="from the image to its truth and its prediction">
<div class="ends"><span>image</span><span>truth</span><span>prediction</span></div>
</figure>
{% endfor %}
<h2>Images</h2>
<table class="images">
<tr><th>image</th><th>Dice</th></tr>
{% for name, dice in ranking %}
<tr><td>{{ name }}</td><td class="number">{{ "%.4f" % dice }}</td></tr>
{% endfor %}
</table>
<h2>What was trained on what</h2>
<table class="settings">
{% for name, value in settings.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
<script>
for (const input of document.querySelectorAll("input[type=range]"))
  input.addEventListener("input", () => {
    const layers = input.parentElement.querySelectorAll("img");
    for (let i = 1; i < layers.length; i++)
      layers[i].style.opacity = Math.min(1, Math.max(0, input.value - i + 1));
  });
</script>
</body>
</html>
"""


def write_html(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[tuple[Sample, float]],
    metrics: Mapping[str, Any],
    ranking: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
) -> None:
    """Write the report as HTML, whole or not at all.

    Args:
        history: as of `write_report`.
        samples: images to be shown, and the Dice of each.
        metrics: `weights`; `images`, `dice` and `iou` by class where images were kept out.
        ranking: every image and its Dice.
        settings: what was trained on what, by name.
    """
    kept_out = "dice" in metrics
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    text = page.render(
        title="A U-Net trained by fastunet",
        heading="The best and the worst of them" if kept_out else "Images it was trained on",
        curves=_curves(history),
        pictures=[{"name": sample.name, "dice": dice, "layers": _layers(sample)} for sample, dice in samples],
        metrics=metrics,
        ranking=ranking,
        settings=settings,
    )
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    figure = Figure(figsize=(WIDTH, CURVES_HEIGHT), dpi=DPI, layout="constrained")
    draw_curves(figure, history)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return _embedded(content.getvalue())


def _layers(sample: Sample) -> list[tuple[str, str]]:
    small = thinned(sample)
    pictures = {
        "image": displayable(small.image),
        "truth": colour_labels(small.truth),
        "prediction": colour_labels(small.prediction),
    }
    layers = []
    for name, picture in pictures.items():
        content = io.BytesIO()
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(content, format="png")
        layers.append((name, _embedded(content.getvalue())))
    return layers


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
