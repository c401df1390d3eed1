"""The bytes a net's kernels move, by their launches alone: beside the floor's and eager's, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastunet.benchmarks import access_counts
from fastunet.benchmarks import memory as traffic
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.access_counts import Traffic, copies_of
from fastunet.benchmarks.cases import UPSAMPLE, Layer, Settings
from fastunet.kernels import gpu

pytest.importorskip("triton", reason="launches name their kernels")

H100, A100 = gpu.known_target(90), gpu.known_target(80)
CLASSIC = Settings(size=512, batch=16)
PIXELS = 16 * 256 * 256


@pytest.mark.parametrize("target", [H100, A100], ids=lambda target: target.name)
def test_the_classic_net_moves_little_more_than_its_floor(target: gpu.Target) -> None:
    """And less than a third of what eager moves. The lowest transposed convolution alone is above 1.05: on sm_90 its
    launcher turns the weight, 4.2 MB, into another order, beside 105 MB of everything else.
    """
    rows, joined = traffic.net_traffic(CLASSIC, target)
    above = {row.name for row in rows if row.memory_bytes > 1.05 * row.floor_bytes}
    assert above == ({"up1.up"} if target is H100 else set())
    assert all(row.launch.memory == row.floor_bytes for row in rows)
    summary = traffic.summarise(rows, joined)
    assert 1 <= summary["layer by layer"]["of_floor"] < 1.002
    assert round(summary["layer by layer"]["of_eager"], 2) == 0.32
    assert round(summary[traffic.JOINED]["of_eager"], 2) == 0.28


def test_what_is_copied_is_the_transposed_weight() -> None:
    rows, _ = traffic.net_traffic(CLASSIC, H100)
    copied = {row.name: row.copies.read for row in rows if row.copies.memory}
    channels = {"up1.up": (1024, 512), "up2.up": (512, 256), "up3.up": (256, 128), "up4.up": (128, 64)}
    assert copied == {name: 2 * c_in * c_out * 4 for name, (c_in, c_out) in channels.items()}


def test_a_joined_head_saves_the_last_image_twice() -> None:
    """y of the last convolution is neither written nor read."""
    rows, joined = traffic.net_traffic(CLASSIC, H100)
    assert joined is not None
    apart = rows[-2].memory_bytes + rows[-1].memory_bytes
    assert apart - joined.memory_bytes == 2 * (16 * 64 * 512 * 512 * 2)


def test_a_composed_step_up_saves_the_upsampled_image_twice() -> None:
    """It is neither written nor read; the weights are others, and there is a seventh less to multiply."""
    rows, joined = traffic.net_traffic(CLASSIC, H100)
    composed = traffic.composed_traffic(CLASSIC, H100)
    by_name = {row.name: row for row in rows}
    assert [row.name for row in composed] == [f"up{i}.up+up{i}.c1" for i in (1, 2, 3, 4)]
    for row, c, side in zip(composed, (512, 256, 128, 64), (64, 128, 256, 512), strict=True):
        apart = [by_name[name] for name in row.name.split("+")]
        weights = 2 * (2 * c * c * 4 + 9 * 2 * c * c), 2 * (9 * c * c + 16 * 2 * c * c)
        image, border, copies = 16 * side**2 * c * 2, 16 * c * 4 - c * 2, sum(r.copies.memory for r in apart)
        saved = sum(each.memory_bytes for each in apart) - copies - row.memory_bytes
        assert saved == 2 * image + weights[0] - weights[1] - border
        assert row.flops / sum(each.flops for each in apart) == 17 / 20
        assert row.launch.memory == row.floor_bytes
    summary = traffic.summarise(rows, joined, composed)
    assert round(summary[traffic.COMPOSED]["of_eager"], 2) == 0.23
    assert traffic.composed_traffic(CLASSIC, A100) == []


def test_a_head_that_does_not_fit_is_not_joined() -> None:
    """A program holds at most 128 channels, and 8 classes."""
    for settings in (Settings(size=32, features=(256, 512)), Settings(size=32, out_channels=9)):
        rows, joined = traffic.net_traffic(settings, H100)
        assert joined is None
        assert traffic.JOINED not in traffic.summarise(rows, joined)


def test_loads_from_l2_by_hand() -> None:
    """down1.c2, 128 to 128 channels at 256x256: nine boxes of 32x8 pixels by descriptors, of 16x8 by pointers, each
    beside all weights; of the taps, those outside the image cost nothing.
    """
    taps = 16 * (3 * 256 - 2) ** 2 * 128 * 2
    for target, tile, form in ((H100, 32 * 8, "descriptor"), (A100, 16 * 8, "pointer")):
        rows, _ = traffic.net_traffic(CLASSIC, target)
        row = next(row for row in rows if row.name == "down1.c2")
        tiles = PIXELS // tile
        assert row.form == form
        assert row.launch.loaded == taps + tiles * (9 * 128 * 128 + 128) * 2
        assert row.launch.stored == PIXELS * 128 * 2 * 5 // 4


def test_every_level_of_the_classic_net_by_bytes_for_a_flop() -> None:
    """A tile of P pixels and N channels takes 1/P + 1/N bytes of 16-bit operands for every FLOP, less the edges."""
    for target in (H100, A100):
        for row in traffic.net_traffic(CLASSIC, target)[0]:
            if ".c" not in row.name or row.name == "inc.c1":
                continue
            tile_h, tile_w, block_n, _ = (int(size) for size in row.config.split()[0].split("x"))
            inner = 1 / (tile_h * tile_w) + 1 / block_n
            # At 32x32 pixels, 2 * 2/3 of a pixel's width are cut off the taps of each row.
            assert 0.96 * inner < row.l2_bytes_per_flop <= inner * 1.001


@pytest.mark.parametrize("tile", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("size", [1, 2, 5, 13, 64])
def test_rows_of_taps_by_enumeration(size: int, tile: int) -> None:
    covered = range(-(-size // tile) * tile)
    assert access_counts.tap_rows(size) == sum(0 <= row + tap < size for row in range(size) for tap in (-1, 0, 1))
    assert access_counts.tap_rows(size, tile) == sum(0 <= row + tap < size for row in covered for tap in (-1, 0, 1))


@pytest.mark.parametrize(("size", "box"), [(64, 64), (80, 64), (33, 32)])
def test_rows_of_boxes_by_enumeration(size: int, box: int) -> None:
    limit, first = 100, 10
    loaded = [row for at in range(first, first + size, box) for row in range(at, at + box) if row < limit]
    assert access_counts._box_rows(first, size, box, limit) == len(loaded)


def test_only_a_copy_counts_as_one() -> None:
    """A view of what was given is none."""
    given = torch.empty(4, 8, device="meta")
    kept, copied = given.t(), given.t().contiguous()
    launch = gpu.Launch(None, 1, {"a_ptr": kept, "b_ptr": None, "n": 3}, 4, 1)
    assert copies_of(launch, [given, None]) == Traffic()
    launch = gpu.Launch(None, 1, {"a_ptr": copied}, 4, 1)
    assert copies_of(launch, [given]) == Traffic(128, 128, 128, 128)


def test_what_is_no_kernel_has_no_traffic() -> None:
    with pytest.raises(ValueError, match=f"expected an op of fastunet's kernels, got '{UPSAMPLE}'"):
        traffic.layer_traffic(Layer("up1.up", UPSAMPLE, {"x": (1, 4, 8, 8)}, 7), H100)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "traffic.json"
    command = ["--features", "8", "16", "--size", "16", "--batch", "2", "--capability", "89", "--out", str(out)]
    assert main(["memory", "moved", *command]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    assert found["settings"] == {
        "features": [8, 16],
        "in_channels": 3,
        "out_channels": 2,
        "size": 16,
        "batch": 2,
        "dtype": "bfloat16",
    }
    rows = found["sm_89"]["rows"]
    assert [row["name"] for row in rows] == [
        *("inc.c1", "inc.c2", "down1.c1", "down1.c2", "up1.up", "up1.c1", "up1.c2", "outc", "up1.c2+outc")
    ]
    cells = next(line for line in printed if line.startswith("| inc.c2 |")).split(" | ")
    moved = rows[1]["launch"]["read"] + rows[1]["launch"]["written"] + rows[1]["copies"]["read"]
    assert cells[4] == f"{moved / 1e6:.1f}"
    assert found["sm_89"]["summary"]["layer by layer"]["floor_bytes"] == sum(row["floor_bytes"] for row in rows[:-1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "8"], "expected --batch from 1 and --size from 16, got 16 and 8"),
        (["--features", "8"], "two or more features >= 1"),
    ],
)
def test_the_command_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "moved", *arguments])
    assert said in capsys.readouterr().err
