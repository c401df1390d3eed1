"""How a run's data are read is kept with it: resumed, evaluated and predicted on without being told again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import error_of, fastunet
from image_files import noise, save, write_masks
from PIL import Image
from stopped_training import TINY

import fastunet as library
from fastunet.checks import ConfigError
from fastunet.data import DataOptions
from fastunet.train.checkpoint import load_config
from fastunet.train.loop import train

SHORT = ["--steps", "2", "--features", "4,8", "--crop", "32", "--batch-size", "2", "--precision", "fp32"]


def folder(root: Path, values: tuple[int, ...], colours: bool = False) -> Path:
    for index in range(3):
        mask = np.full((32, 32), values[0], np.uint8)
        for place, value in enumerate(values[1:]):
            mask[4:20, 12 * place + 2 : 12 * place + 10] = value
        save(root / "raw" / f"{index}.png", noise((32, 32), seed=index) // 4 + mask // 2)
        red = np.stack([mask, 0 * mask, 0 * mask], -1)
        save(root / "truth" / f"{index}_mask.png", red if colours else mask)
    return root


def test_a_run_keeps_how_its_data_are_read(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "data", (10, 60, 200)), tmp_path / "run"
    options = ["--images", "raw", "--masks", "truth", "--mask-suffix", "_mask", "--labels", "10,60,200"]
    fastunet("train", data, "--out", out, *SHORT, *options)
    run = load_config(out)
    assert run.reading == DataOptions("raw", "truth", "_mask", "10,60,200")
    assert (run.data.classes, run.data.labels) == (3, (10, 60, 200))
    fastunet("train", "--out", out, "--resume", "--steps", "3")
    refused = error_of("train", "--out", out, "--resume", "--labels", "10,200")
    assert "labels: expected '10,60,200', with which" in refused
    fastunet("evaluate", out, data)
    error_of("evaluate", out, data, "--masks", "gone")
    fastunet("predict", out, data / "raw", "--out", tmp_path / "labels")
    for name in ("0", "1", "2"):
        assert set(np.unique(np.asarray(Image.open(tmp_path / "labels" / f"{name}.png")))) <= {10, 60, 200}
    mask = library.load(out, "cpu").predict(data / "raw" / "0.png")
    assert set(np.unique(mask)) <= {10, 60, 200}


def test_predictions_have_the_colours_of_the_masks(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "data", (0, 200), colours=True), tmp_path / "run"
    reading = DataOptions("raw", "truth", "_mask", "0:0:0,200:0:0")
    train(data, out, TINY, reading=reading)
    with pytest.raises(ConfigError, match="mask_suffix: expected '_mask', with which"):
        train(data, out, TINY, reading=DataOptions("raw", "truth", labels="0:0:0,200:0:0"), resume=True)
    fastunet("predict", out, data / "raw", "--out", tmp_path / "labels")
    with Image.open(tmp_path / "labels" / "0.png") as image:
        assert {colour for _, colour in image.convert("RGB").getcolors()} <= {(0, 0, 0), (200, 0, 0)}


def test_a_run_on_outlines_of_sections_knows_the_names_of_its_classes(tmp_path: Path) -> None:
    """A run keeps the order of its classes, whatever those of the data it is scored on."""
    for root, names in (("data", ("nucleus", "cell")), ("other", ("cell",))):
        for index in range(3):
            save(tmp_path / root / "images" / f"{index}.png", noise((32, 32), seed=index))
            outlines = [
                {"label": name, "points": [[2 + 12 * place, 4], [12 + 12 * place, 20]], "shape_type": "rectangle"}
                for place, name in enumerate(names)
            ]
            (tmp_path / root / "masks").mkdir(exist_ok=True)
            (tmp_path / root / "masks" / f"{index}.json").write_text(json.dumps({"shapes": outlines}))
    out, scores = tmp_path / "run", tmp_path / "scores.json"
    metrics = train(tmp_path / "data", out, TINY)
    assert list(metrics["dice"]) == ["background", "cell", "nucleus"]
    fastunet("evaluate", out, tmp_path / "other", "--out", scores)
    assert list(json.loads(scores.read_text())["dice"]) == ["background", "cell", "nucleus"]


def test_a_stack_trains_and_is_scored_section_by_section(tmp_path: Path) -> None:
    masks = np.broadcast_to(np.arange(32, dtype=np.uint8) // 16, (5, 32, 32))
    for kind, sections in (("images", noise((5, 32, 32))), ("masks", masks)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        np.save(tmp_path / "data" / kind / "s.npy", sections)
    train(tmp_path / "data", tmp_path / "run", TINY)
    run = load_config(tmp_path / "run")
    assert (run.train, run.val) == ([f"s_00{n}" for n in range(4)], ["s_004"])
    fastunet("evaluate", tmp_path / "run", tmp_path / "data")


def test_ignored_pixels_of_a_mask_are_not_scored(tmp_path: Path) -> None:
    """A run on masks without any is scored on others that have some."""
    train(bordered(tmp_path / "data", 0), tmp_path / "run", TINY)
    scores = []
    for name, border in (("whole", 0), ("some", 255)):
        out = tmp_path / f"{name}.json"
        data = bordered(tmp_path / name, border)
        fastunet("evaluate", tmp_path / "run", data, "--out", out, "--ignore", "255")
        scores.append(json.loads(out.read_text())["accuracy"])
    assert scores[0] != scores[1]


def bordered(root: Path, border: int) -> Path:
    """Masks of 0 and 1, with another value in a quarter of them."""
    mask = np.zeros((32, 32), np.uint8)
    mask[4:20, 4:20], mask[:8] = 1, border
    return write_masks(root, mask, count=3)


def test_stacks_are_predicted_section_by_section_and_nifti_stays_where_it_was(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
    train(bordered(tmp_path / "data", 0), tmp_path / "run", TINY)
    volume = noise((24, 32, 3))
    affine = np.array([[0, 2, 0, 5], [-3, 0, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]], float)
    images, out = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, images / "v.nii.gz")
    np.save(images / "s.npy", volume.transpose(2, 1, 0))
    fastunet("predict", tmp_path / "run", images, "--out", out)
    assert {file.name for file in out.iterdir()} == {"v.nii.gz", "s_000.png", "s_001.png", "s_002.png"}
    found = nibabel.load(out / "v.nii.gz")
    assert (found.shape, found.header.get_xyzt_units()) == ((24, 32, 3), ("mm", "unknown"))
    np.testing.assert_array_equal(found.affine, affine)
    segmenter = library.load(tmp_path / "run", "cpu")
    for index in range(3):
        expected = segmenter.predict(volume[..., index].T)
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"s_00{index}.png")), expected)
        np.testing.assert_array_equal(np.asarray(found.dataobj)[..., index].T, expected)
    assert "--overwrite" in error_of("predict", tmp_path / "run", images / "v.nii.gz", "--out", out)
    again = ("predict", tmp_path / "run", images / "v.nii.gz", "--out", out, "--overwrite")
    fastunet(*again)
    assert "more than the labels" in error_of(*again, "--overlay")
    nibabel.save(image, out / "v.nii.gz")
    assert "expected a file that fastunet wrote" in error_of(*again)
