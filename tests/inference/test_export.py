"""Exported runs give the mask of `predict`, from the pixels of a file, in other runtimes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra test")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnx
import onnxruntime
import torch
from command import error_of
from command import fastunet as fastunet_command
from untrained_run import smooth_image, untrained_run

import fastunet
from fastunet.checks import DataError
from fastunet.inference.export import Pipeline, export_bioimageio, export_onnx, export_torch
from fastunet.segmenter import Segmenter

SIZES = ((1, 64, 96), (3, 37, 51), (2, 100, 33))


def pixels_of(segmenter: Segmenter, count: int, height: int, width: int) -> np.ndarray:
    """[N, C, H, W] in the range of the run's dtype, each image another."""
    data = segmenter.config.data
    whole = smooth_image().astype(np.float64) / 255
    scale = 3.0 if data.dtype == "float32" else np.iinfo(data.dtype).max
    parts = [[whole[9 * n + c :][:height, 31 * c :][:, :width] for c in range(data.channels)] for n in range(count)]
    return (np.array(parts) * scale).astype(data.dtype)


def check_like_predict(segmenter: Segmenter, pixels: np.ndarray, mask: np.ndarray, probabilities: np.ndarray) -> None:
    assert (mask.dtype, probabilities.dtype) == (np.uint8, np.float32)
    for index, image in enumerate(np.moveaxis(pixels, 1, -1)):
        expected = segmenter.predict(image, probabilities=True)
        np.testing.assert_allclose(probabilities[index], expected, rtol=0, atol=1e-5)
        ranked = np.sort(expected, 0) if len(expected) > 1 else np.stack([1 - expected[0], expected[0]])
        clear = np.abs(ranked[-1] - ranked[-2]) > 2e-5
        assert clear.mean() > 0.95
        assert np.array_equal(mask[index][clear], segmenter.predict(image)[clear])


@pytest.mark.parametrize(
    ("classes", "channels", "dtype", "model"),
    [(1, 1, "uint8", {}), (3, 2, "uint16", {"norm": "instance"}), (1, 3, "float32", {"head": "sigmoid"})],
    ids=["binary", "classes", "probabilities"],
)
def test_other_runtimes_give_what_predict_gives(
    classes: int, channels: int, dtype: str, model: dict[str, str], tmp_path: Path
) -> None:
    segmenter = fastunet.load(untrained_run(tmp_path / "run", classes, channels, dtype, **model), "cpu")
    export_onnx(segmenter.model, segmenter.config.data, tmp_path / "model.onnx")
    export_torch(segmenter.model, segmenter.config.data, tmp_path / "model.pt2")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in SIZES:
        pixels = pixels_of(segmenter, *size)
        check_like_predict(segmenter, pixels, *session.run(["mask", "probabilities"], {"pixels": pixels}))
        check_like_predict(segmenter, pixels, *(t.detach().numpy() for t in program(torch.from_numpy(pixels))))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model.onnx", "model.pt2"}


def test_a_package_for_bioimageio(tmp_path: Path) -> None:
    spec = pytest.importorskip("bioimageio.spec", reason="needs the extra bioimageio")
    run = untrained_run(tmp_path / "cells", 3)
    fastunet_command("export", run, "--to", "bioimageio")
    package = run / "model.bioimageio.zip"
    description = spec.load_description(package, perform_io_checks=True)
    assert description.validation_summary.status in ("valid-format", "passed")
    assert description.name == "cells"
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "unpacked")
    pixels, *expected = (np.load(tmp_path / f"unpacked/{name}.npy") for name in ("pixels", "mask", "probabilities"))
    versions = {opset.domain: opset.version for opset in onnx.load(tmp_path / "unpacked/model.onnx").opset_import}
    assert description.weights.onnx.opset_version == versions[""]
    session = onnxruntime.InferenceSession(tmp_path / "unpacked/model.onnx")
    for found, each in zip(session.run(None, {"pixels": pixels}), expected, strict=True):
        np.testing.assert_allclose(found, each, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["", "run", 129 * "x", "a/b/c/d", "[/b]ab", "\u00e9\u00e9\u00e9\u00e9\u00e9", "\udcff12345", "a\nbcde"]
)
def test_names_that_bioimageio_does_not_allow(name: str, tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run")
    line = error_of("export", run, "--to", "bioimageio", "--name", name, "--out", tmp_path / "x/model.zip")
    assert line.startswith("error: name: expected 5 to 128 of the letters a to z, digits, spaces and _+-(), got ")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_model_that_finds_little_goes_to_bioimageio_too(tmp_path: Path) -> None:
    pytest.importorskip("bioimageio.spec", reason="needs the extra bioimageio")
    segmenter = fastunet.load(untrained_run(tmp_path / "run", norm="instance"), "cpu")
    arguments = segmenter.model, segmenter.config.data
    fine = torch.from_numpy(np.random.default_rng(0).normal(100, 20, (1, 1, 16, 12)).astype(np.uint8))
    head = segmenter.model.outc.conv
    with torch.no_grad():
        head.weight.neg_()
        head.bias.sub_(Pipeline(*arguments)(fine)[1].logit().max() + 1)
        assert not Pipeline(*arguments)(fine)[0].any()
        export_bioimageio(*arguments, tmp_path / "cells.zip", "cells", "text")
        head.bias.sub_(1e4)
        with pytest.raises(DataError, match="model: expected one that finds something in one of 5 test images"):
            export_bioimageio(*arguments, tmp_path / "none.zip", "cells", "text")
    with zipfile.ZipFile(tmp_path / "cells.zip") as archive, archive.open("mask.npy") as file:
        assert np.load(file).any()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "cells.zip"}


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "bioimageio"])
def test_folders_of_any_name_take_exports_if_the_disk_does(kind: str, tmp_path: Path) -> None:
    """In processes of their own, which torch may end."""
    pytest.importorskip("bioimageio.spec", reason="needs the extra bioimageio")
    run = untrained_run(tmp_path / "[red]\udcff\n")
    command = [sys.executable, "-m", "fastunet", "export", str(run), "--to", kind, "--name", "cells"]
    before = {*run.iterdir()}
    limited = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "", *command]  # KiB a file
    result = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (2, "error: output: [Errno 27] File too large")
    assert {*run.iterdir()} == before
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert len([*run.glob("model.*")]) == 2  # with the weights


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run")
    (run / "model.onnx").write_text("mine")
    found = error_of("export", run, "--to", "onnx")
    assert found == f"error: {run}/model.onnx: expected nothing there, got a file"
    assert (run / "model.onnx").read_text() == "mine"
