"""A training run as one HTML file that needs no network: curves, scores, and images with truth and prediction."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from fastunet.files import written_whole
from fastunet.inference.outputs import class_palette, displayable
from fastunet.train.report import (
    DPI,
    Sample,
    colour_labels,
    draw_dice,
    draw_loss,
    thinned,
)

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 1.6em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
.settings td:first-child { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.curves, .pictures { display: grid; gap: 1.5em 1em; }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.curves img { width: 100%; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 1em; }
figcaption span:first-child { overflow-wrap: anywhere; }
figcaption span:last-child { white-space: nowrap; }
.stack { position: relative; }
.stack img { width: 100%; display: block; }
.stack.small img { image-rendering: pixelated; }
.stack img + img { position: absolute; top: 0; left: 0; opacity: 0; }
input[type=range] { width: 100%; margin: .4em 0 0; }
.ends { display: flex; justify-content: space-between; }
.ends button { font: inherit; font-size: 13px; color: #555; background: none; border: 0; padding: 0; cursor: pointer; }
.ends button:hover { text-decoration: underline; }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.2em; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid #888; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Weights: {{ metrics.weights }}.</p>
<div class="curves">
{% for name, picture in curves %}<img alt="{{ name }} against steps" src="{{ picture }}">
{% endfor %}</div>
{% if metrics.dice is defined %}
<h2>Scores of {{ metrics.images | length }} image{{ "s" if metrics.images | length != 1 }} kept out of training</h2>
<table class="scores">
<tr><th>class</th><th class="number">Dice</th><th class="number">IoU</th></tr>
{% for name, dice in metrics.dice.items() %}
<tr><td>{{ name }}</td>
<td class="number">{{ "%.4f" % dice }}</td><td class="number">{{ "%.4f" % metrics.iou[name] }}</td></tr>
{% endfor %}
</table>
{% endif %}
<h2>{{ heading }}</h2>
<p class="legend">
{% for name, colour in legend %}<span><i class="swatch" style="background: {{ colour }}"></i>{{ name }}</span>
{% endfor %}</p>
<div class="pictures">
{% for picture in pictures %}
<figure>
<figcaption><span>{{ picture.name }}</span><span>Dice {{ "%.4f" % picture.dice }}</span></figcaption>
<div class="stack{{ " small" if picture.is_small }}">
{% for layer in picture.layers %}<img alt="{{ layer[0] }}" src="{{ layer[1] }}">
{% endfor %}</div>
<input type="range" min="0" max="2" step="0.05" value="0" autocomplete="off"
 aria-label="from the image to its truth and its prediction">
<div class="ends">
{% for layer in picture.layers %}<button type="button" value="{{ loop.index0 }}">{{ layer[0] }}</button>
{% endfor %}</div>
</figure>
{% endfor %}
</div>
<h2>Images</h2>
<table class="images">
<tr><th>image</th><th class="number">Dice</th></tr>
{% for name, dice in ranking %}
<tr><td>{{ name }}</td><td class="number">{{ "%.4f" % dice if dice == dice else "ignored" }}</td></tr>
{% endfor %}
</table>
<h2>What was trained on what</h2>
{% for part, table in settings.items() %}
<details{{ " open" if loop.first }}>
<summary>{{ part }}</summary>
<table class="settings">
{% for name, value in table.items() %}
<tr><td>{{ name }}</td><td>{{ value | shown }}</td></tr>
{% endfor %}
</table>
</details>
{% endfor %}
<script>
for (const input of document.querySelectorAll("input[type=range]")) {
  const layers = input.parentElement.querySelectorAll("img");
  input.addEventListener("input", () => {
    for (let i = 1; i < layers.length; i++)
      layers[i].style.opacity = Math.min(1, Math.max(0, input.value - i + 1));
  });
  for (const button of input.parentElement.querySelectorAll("button"))
    button.addEventListener("click", () => {
      input.value = button.value;
      input.dispatchEvent(new Event("input"));
    });
}
</script>
</body>
</html>
"""
CURVE_SIZE = (5.0, 2.75)  # inches
SMALL = 400  # pixels along an edge, below which a picture is enlarged: with its pixels to be seen


def write_html(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[tuple[Sample, float]],
    metrics: Mapping[str, Any],
    ranking: Sequence[tuple[str, float]],
    settings: Mapping[str, Mapping[str, Any]],
    class_names: Sequence[str],
) -> None:
    """Write the report as HTML, whole or not at all.

    Args:
        history: as of `write_report`.
        samples: images to be shown, and the Dice of each.
        metrics: `weights`; `images`, `dice` and `iou` by class where images were kept out.
        ranking: every image and its Dice, NaN where none of its pixels counts.
        settings: what was trained on what: tables by their headings, of values by name.
        class_names: of labels 0, 1, ...
    """
    kept_out = "dice" in metrics
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = _shown
    text = environment.from_string(TEMPLATE).render(
        title="A U-Net trained by fastunet",
        heading="The best and the worst of them" if kept_out else "Images it was trained on",
        curves=_curves(history),
        legend=[(name, to_hex(class_palette()[label] / 255)) for label, name in enumerate(class_names)],
        pictures=[
            {
                "name": sample.name,
                "dice": dice,
                "layers": _layers(sample),
                "is_small": max(sample.truth.shape) < SMALL,
            }
            for sample, dice in samples
        ],
        metrics=metrics,
        ranking=ranking,
        settings=settings,
    )
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _shown(value: Any) -> str:
    """Give a setting as text."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)


def _curves(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    curves = []
    for name, draw in (("Training loss", draw_loss), ("Validation Dice", draw_dice)):
        figure = Figure(figsize=CURVE_SIZE, dpi=2 * DPI, layout="constrained")
        draw(figure.subplots(), history)
        curves.append((name, _embedded(figure.savefig)))
    return curves


def _layers(sample: Sample) -> list[tuple[str, str]]:
    small = thinned(sample)
    pictures = {
        "image": displayable(small.image),
        "truth": colour_labels(small.truth),
        "prediction": colour_labels(small.prediction),
    }
    pixels = {name: np.round(picture * 255).astype(np.uint8) for name, picture in pictures.items()}
    return [(name, _embedded(Image.fromarray(each).save)) for name, each in pixels.items()]


def _embedded(save: Callable[..., Any]) -> str:
    content = io.BytesIO()
    save(content, format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
