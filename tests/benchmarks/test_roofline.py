"""The roofline: the work and the floors of a net's layers, from them the table, the plot and the command."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra train")

import torch
from fastunet.benchmarks import charts, roofline
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Layer, Settings, eager_passes, fused_pass, meta_unet, unet_layers
from fastunet.benchmarks.gpu_steps import Step, describe
from fastunet.benchmarks.roofline import Point, Roofs, eager_seconds, floor_seconds, point_of
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fastunet

H100 = Roofs(790e12, 3.0e12, source="assumed")
CLASSIC = (64, 128, 256, 512, 1024)
BATCH = 16
# Microseconds of the classic net, 16 images of 512x512 in bfloat16, at these roofs: the floor, and eager at the roofs.
# Derived by hand, independently of the code; a transposed convolution is counted with the convolution it feeds.
MICROSECONDS = {
    "inc.c1": (187, 903),
    "inc.c2": (403, 1331),
    "down1.c1": (196, 554),
    "down1.c2": (391, 861),
    "down2.c1": (196, 375),
    "down2.c2": (391, 626),
    "down3.c1": (196, 285),
    "down3.c2": (391, 509),
    "down4.c1": (196, 240),
    "down4.c2": (391, 436),
    "up1.c1": (870, 1094),
    "up1.c2": (391, 481),
    "up2.c1": (870, 1317),
    "up2.c2": (391, 570),
    "up3.c1": (917, 1812),
    "up3.c2": (391, 749),
    "up4.c1": (1051, 2841),
    "up4.c2": (391, 1107),
    "outc": (185, 196),
}


def classic(batch: int = BATCH, **options: Any) -> list[Layer]:
    return unet_layers(meta_unet(3, 2, CLASSIC, **options), batch, 512, 512)


def test_floor_and_eager_of_the_classic_net_to_the_printed_digit() -> None:
    found: dict[str, list[float]] = {}
    for layer in classic():
        sums = found.setdefault(layer.name.replace(".up", ".c1"), [0.0, 0.0])
        sums[0] += floor_seconds(layer, H100)
        sums[1] += eager_seconds(layer, H100)
    assert {name: tuple(round(1e6 * s) for s in sums) for name, sums in found.items()} == MICROSECONDS
    assert [round(1e6 * sum(column)) for column in zip(*found.values(), strict=True)] == [8397, 16288]


def test_bytes_of_the_classic_net() -> None:
    """675 MB an image fused and 2141 eager, of which the weights, read once a batch, are 62 MB / 16."""
    layers = classic()
    fused = sum(fused_pass(layer, 2).bytes for layer in layers) / BATCH
    eager = sum(work.bytes for layer in layers for work in eager_passes(layer, 2)) / BATCH
    assert (math.floor(fused / 1e6), math.floor(eager / 1e6)) == (675, 2141)
    assert round(sum(layer.flops for layer in layers) / BATCH / 1e9, 1) == 385.4
    one = classic(batch=1)
    # 31.0 million parameters of 2 bytes; the norms' are not among them.
    weights = 2 * sum(p.numel() for name, p in meta_unet(3, 2, CLASSIC, norm=None).named_parameters())
    assert sum(fused_pass(layer, 2).bytes for layer in one) - fused == pytest.approx(weights * (1 - 1 / BATCH))


def test_bytes_of_a_small_net_by_hand() -> None:
    """UNet(1, 2, (4, 8)) without norm on two images of 8x6, float32."""
    layers = {layer.name: layer for layer in unet_layers(meta_unet(1, 2, (4, 8), norm=None), 2, 8, 6)}
    pixels, low = 2 * 8 * 6, 2 * 4 * 3
    by_hand = {
        "inc.c1": pixels * (1 + 4) + 4 * 1 * 9 + 4,
        "inc.c2": pixels * (4 + 4) + low * 4 + 4 * 4 * 9 + 4,
        "down1.c1": low * (4 + 8) + 8 * 4 * 9 + 8,
        "down1.c2": low * (8 + 8) + 8 * 8 * 9 + 8,
        "up1.up": low * 8 + pixels * 4 + 8 * 4 * 4 + 4,
        "up1.c1": pixels * (4 + 4 + 4) + 4 * 8 * 9 + 4,
        "up1.c2": pixels * (4 + 4) + 4 * 4 * 9 + 4,
        "outc": pixels * (4 + 2) + 2 * 4 + 2,
    }
    assert {name: fused_pass(layer, 4).bytes for name, layer in layers.items()} == {
        name: 4 * elements for name, elements in by_hand.items()
    }
    eager = {name: [(work.name, work.bytes // 4) for work in eager_passes(layer, 4)] for name, layer in layers.items()}
    assert eager["inc.c2"] == [
        ("conv", pixels * 8 + 4 * 4 * 9 + 4),
        ("bias or norm", 2 * pixels * 4),
        ("activation", 2 * pixels * 4),
        ("pool", pixels * 4 + low * 4),
    ]
    assert eager["up1.c1"][:2] == [("cat", 2 * pixels * 8), ("conv", pixels * 12 + 4 * 8 * 9 + 4)]
    assert [name for name, _ in eager["up1.up"]] == [name for name, _ in eager["outc"]] == ["conv", "bias or norm"]


def test_instance_norm_reads_the_sum_once_more() -> None:
    (layer, *_) = classic()
    extra = eager_seconds(layer, H100, instance_norm=True) - eager_seconds(layer, H100)
    assert extra == pytest.approx(2 * math.prod(layer.outputs["y"]) / 3.0e12)


def test_bilinear_upsampling_is_a_pass_of_its_own() -> None:
    layers = {layer.name: layer for layer in classic(upsample="bilinear")}
    up = layers["up1.up"]
    assert up.inputs == {"x": (16, 512, 32, 32)}  # Its net has half the channels on the lowest level.
    assert up.outputs == {"y": (16, 512, 64, 64)}
    assert layers["up1.c1"].inputs == {"skip": (16, 512, 64, 64), "up": (16, 512, 64, 64)}
    work = fused_pass(up, 2)
    assert work.bytes == 2 * 5 * math.prod(up.shapes["x"])
    assert [each.bytes for each in eager_passes(up, 2)] == [work.bytes]
    # Beside the interpolation, the FLOPs are those of the net's convolutions, as PyTorch counts them.
    model = fastunet.UNet(3, 2, features=(8, 16, 32), upsample="bilinear").to_reference().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 32, 16))
    counted = [layer for layer in unet_layers(model, 2, 32, 16) if "weight" in layer.shapes]
    assert sum(layer.flops for layer in counted) == counter.get_total_flops()


def composed(up: Layer, conv: Layer) -> Layer:
    """Both as one: a 3x3 convolution of the skip, and a 4x4 transposed one, of stride 2, of the lower level itself."""
    (batch, skip, height, width), (_, low, _, _) = conv.shapes["skip"], up.shapes["x"]
    out = conv.shapes["weight"][0]
    shapes = {"skip": conv.shapes["skip"], "x": up.shapes["x"], "weight": (out, skip, 3, 3)}
    shapes |= {"composed weight": (low, out, 4, 4), "bias": (out,)}
    pixels = batch * height * width
    return Layer(conv.name, conv.op, shapes, 2 * pixels * out * (9 * skip + 4 * low))  # Of 16 taps a pixel meets 4.


def test_what_is_left_to_gain_by_composing_layers() -> None:
    """Without the head's own pass, and with each up-convolution composed with the convolution that it feeds."""
    layers = {layer.name: layer for layer in classic() if layer.name != "outc"}
    joined = sum(floor_seconds(layer, H100) for layer in layers.values())
    assert round(BATCH / joined) == 1948
    for i in range(1, 5):
        layers[f"up{i}.c1"] = composed(layers.pop(f"up{i}.up"), layers[f"up{i}.c1"])
    assert round(1e6 * sum(floor_seconds(layer, H100) for layer in layers.values())) == 7462
    flops = sum(layer.flops for layer in layers.values()) / sum(layer.flops for layer in classic())
    assert round(1 - flops, 3) == 0.067


def test_the_longer_of_arithmetic_and_traffic_is_the_floor() -> None:
    layer = Layer("a", "conv1x1", {"x": (1, 4, 10, 10), "weight": (2, 4, 1, 1), "bias": (2,)}, flops=1600)
    moved = 2 * (400 + 8 + 2 + 200)
    assert floor_seconds(layer, Roofs(1600, moved * 10)) == 1.0
    assert floor_seconds(layer, Roofs(16000, moved / 2)) == 2.0
    assert floor_seconds(layer, Roofs(16000, moved / 2), torch.float32) == 4.0


@pytest.mark.parametrize("bad", [{"matmul_flops": 0.0}, {"copy_bytes": math.nan}, {"l2_bytes": -1.0}])
def test_a_roof_is_a_positive_number(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"expected {next(iter(bad))} above 0"):
        Roofs(**{"matmul_flops": 1.0, "copy_bytes": 1.0, **bad})


# --- what was measured ---


def small_report() -> dict[str, Any]:
    """As gpu_report writes it: one layer faster, one slower, one timed once, one not at all."""
    settings = Settings(size=32, batch=2, features=(8, 16))
    rows: list[dict[str, Any]] = [{"kind": "parity", "name": "x", "variant": "bf16"}]
    times = {"inc.c1": {"triton": 1.0, "aten": 2.0}, "inc.c2": {"triton": 3.0, "aten": 2.0}, "outc": {"triton": 4.0}}
    for layer in settings.net_layers():
        for direction in ("forward", "backward"):
            row = describe(settings, Step("layer", layer.name, direction))
            if layer.name in times:
                row["samples_ms"] = {name: [ms] for name, ms in times[layer.name].items()}
            rows.append(row)
    report: dict[str, Any] = json.loads(json.dumps({"settings": asdict(settings), "rows": rows}))
    return report


def test_points_are_the_reports_forward_layers() -> None:
    points = roofline.points_of_report(small_report(), H100)
    assert [(point.name, point.measured) for point in points] == [
        ("inc.c1", {"triton": 0.001, "aten": 0.002}),
        ("inc.c2", {"triton": 0.003, "aten": 0.002}),
        ("outc", {"triton": 0.004}),
    ]
    layers = {layer.name: layer for layer in Settings(size=32, batch=2, features=(8, 16)).net_layers()}
    assert [point.floor for point in points] == [floor_seconds(layers[point.name], H100) for point in points]
    assert [charts.verdict(point) for point in points] == ["faster", "slower", "alone"]


def test_the_table_gives_floor_and_share() -> None:
    layers = classic()[:2]
    points = [point_of(layers[0], H100, {"triton": 374.6e-6}), point_of(layers[1], H100)]
    lines = roofline.roofline_table(layers, lambda layer: eager_seconds(layer, H100), points).splitlines()
    assert lines[0] == "| layer | GFLOP/img | MB/img | floor µs | eager µs | triton µs | floor is |"
    assert lines[2] == "| inc.c1 | 0.9 | 35.1 | 187 | 903 | 375 | 50% |"
    assert lines[3] == "| inc.c2 | 19.3 | 75.5 | 403 | 1331 |  |  |"
    assert lines[4] == "| total | 20.2 | 110.6 | 590 | 2234 |  |  |"


def test_labels_keep_their_distance_and_stay_inside() -> None:
    wanted = [0.0, 0.5, 0.5, 0.51, 1.0]
    placed = charts.spread(wanted, 0.1)
    assert min(b - a for a, b in itertools.pairwise(placed)) >= 0.1 - 1e-12
    assert placed[0] >= 0.05 - 1e-12
    assert placed[-1] <= 0.95 + 1e-12
    assert placed[2] == pytest.approx(sum(wanted[1:4]) / 3)  # Three that clash share the room about their mean.
    crowded = charts.spread([1.0] * 30, 0.1)
    assert crowded == sorted(crowded)
    assert 0 < crowded[0] < crowded[-1] < 1


def drawn_texts(monkeypatch: pytest.MonkeyPatch, points: list[Point], roofs: Roofs, path: Path) -> list[str]:
    """What the plot says, while it is written."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: list[str] = []
    save = Figure.savefig

    def note(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", note)
    charts.plot_roofline(points, roofs, path)
    return texts


def test_the_plot_names_roofs_layers_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = roofline.points_of_report(small_report(), H100)
    roofs = Roofs(790e12, 3.0e12, l2_bytes=5.5e12, source="assumed")
    texts = drawn_texts(monkeypatch, points, roofs, tmp_path / "roofline.png")
    assert {"inc.c1", "inc.c2", "outc"} <= set(texts)
    assert {"memory: 3 TB/s", "matrix products: 790 TFLOP/s", "L2, for data that is there already: 5.5 TB/s"} <= {
        *texts
    }
    assert {"triton: measured, faster than aten", "triton: measured, slower than aten"} <= set(texts)
    assert "triton: measured, nothing to compare with" in texts
    assert "roofs: assumed" in texts
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.format == "PNG"
    markers = [style["marker"] for style in charts._STYLES.values()]
    assert len(set(markers)) == len(markers)  # They differ without colour.


def test_a_plot_without_measurements_has_floors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [point_of(layer, H100) for layer in classic()]
    texts = drawn_texts(monkeypatch, points, H100, tmp_path / "roofline.png")
    assert {layer.name for layer in classic()} <= set(texts)
    assert not any("measured" in text or "L2" in text for text in texts)
    with pytest.raises(ValueError, match="at least one point"):
        charts.plot_roofline([], H100, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- the command ---


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--tflops", "790", "--tbps", "3.0"]) == 0
    assert "| total | 385.4 | 675.5 | 8397 | 16288 |" in capsys.readouterr().out


def test_the_command_takes_net_and_images_from_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(small_report()))
    out = tmp_path / "roofline.png"
    command = ["--tflops", "1", "--tbps", "1", "--report", str(tmp_path / "report.json"), "--out", str(out)]
    assert main(["roofline", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(Settings(features=(8, 16)).net_layers()) + 2  # Header, layers, total, the file's name.
    assert next(line for line in lines if line.startswith("| inc.c1 |")).split("|")[-5].strip() == "1000"
    assert out.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tflops", "0"], "expected matmul_flops above 0 and finite, got 0.0"),
        (["--size", "8"], "expected --batch from 1 and --size from 16, got 16, 8"),
        (["--report", "no such file"], "no such file"),
    ],
)
def test_the_command_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["roofline", "--tflops", "1", "--tbps", "1", *arguments])
    assert said in capsys.readouterr().err
