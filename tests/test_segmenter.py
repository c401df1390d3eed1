"""A trained run: from files and arrays to labels, in memory and in windows, and what is written of them."""

from __future__ import annotations

import csv
import threading
import time
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("zarr", reason="needs the extra train")

import skimage.measure
import tifffile
import torch
import zarr
from command import error_of
from command import fastunet as fastunet_command
from image_files import noise, save
from PIL import Image
from scipy import ndimage
from untrained_run import smooth_image, untrained_run

import fastunet
from fastunet.checks import ConfigError, DataError
from fastunet.data import find_images, moments, normalize, read_image, read_mask, sources
from fastunet.data.sources import PixelSize, open_source, pixel_size_of
from fastunet.inference.outputs import GRID, WRITERS, Wanted, Writer, class_palette, is_ours, overlay_of, write_rois
from fastunet.segmenter import Segmenter

SIZE = (300, 421)
TILE = 280  # two parts by two, whose edge is 256


@pytest.fixture(scope="module", params=[1, 3], ids=["binary", "classes"])
def segmenter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return fastunet.load(untrained_run(tmp_path_factory.mktemp("runs") / "run", request.param), "cpu")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return smooth_image()


def expected_of(segmenter: Segmenter, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask and probabilities by the public functions, of the whole image."""
    pixels = image if image.ndim == 3 else image[..., None]
    p = fastunet.predict(segmenter.model, normalize(pixels))
    if segmenter.classes == 1:
        return ((p[0] > 0.5).byte() * 255).numpy(), p.numpy()
    return p.argmax(0).byte().numpy(), p.numpy()


def test_files_and_arrays_give_the_same(segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(image).save(tmp_path / "a.png")
    mask, probabilities = expected_of(segmenter, image)
    assert 0.05 < (mask > 0).mean() < 0.95
    for each in (tmp_path / "a.png", str(tmp_path / "a.png"), image, image[..., None], torch.from_numpy(image)):
        assert np.array_equal(segmenter.predict(each), mask)
        assert np.array_equal(segmenter.predict(each, tile=TILE), mask)
    np.testing.assert_allclose(segmenter.predict(image, probabilities=True, tile=TILE), probabilities, atol=1e-6)
    turned = fastunet.predict(segmenter.model, normalize(image[..., None]), tta=True)
    result = segmenter.predict(image, probabilities=True, tile=TILE, tta=True)
    np.testing.assert_allclose(result, turned, atol=1e-6)


def test_an_array_of_a_gpu_is_fetched(segmenter: Segmenter, image: np.ndarray) -> None:
    class OnGpu:
        __cuda_array_interface__: ClassVar = {"shape": image.shape}

        def get(self) -> np.ndarray:
            return image

    assert np.array_equal(segmenter.predict(OnGpu()), expected_of(segmenter, image)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((9, 9, 3), np.uint8), "image: expected 1 channels, as in training, got 3"),
        (np.zeros((9, 9), np.uint16), "image: expected uint8, as in training, got uint16"),
        (np.zeros((9, 9), np.int64), "image: expected uint8, uint16, float32, got int64"),
        (np.zeros((1, 9), np.uint8), "image: expected at least 2x2 pixels for 2 levels, got 1x9"),
        (np.zeros(9, np.uint8), r"image: expected \[H, W\] or \[H, W, C\] with pixels, got shape \[9\]"),
        ("nothing.png", "nothing.png: expected a file, got nothing there"),
        ("nothing.zarr", "nothing.zarr: expected a Zarr array, got: nothing there"),
    ],
)
def test_other_images_are_refused(segmenter: Segmenter, wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        segmenter.predict(wrong)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["a.npy", "a.tif"])
def test_sections_are_no_channels_where_each_has_them_all(name: str, count: int, channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, channels), np.uint8)
    if name == "a.npy":
        np.save(tmp_path / name, pixels)
    else:
        axes = {"metadata": {"axes": "ZCYX"}, "imagej": True}
        tifffile.imwrite(tmp_path / name, np.moveaxis(pixels, -1, 1), photometric="minisblack", **axes)
    segmenter = fastunet.load(untrained_run(tmp_path / "run", channels=channels), "cpu")
    sections = segmenter.sections_of(tmp_path / name)
    assert sections == ([None] if count == 1 else list(range(count)))
    for section, expected in zip(sections, pixels, strict=True):
        np.testing.assert_array_equal(segmenter.source_of(tmp_path / name, section)[:], expected)


def test_a_tile_must_have_room(segmenter: Segmenter) -> None:
    assert segmenter.check_tile(18)
    with pytest.raises(ConfigError, match="tile: expected at least 18 pixels"):
        segmenter.check_tile(17)


STORED: dict[str, dict[str, Any]] = {
    "strips": {},
    "tiles": {"tile": (64, 48), "compression": "deflate", "predictor": True},
    "planes": {"planarconfig": "separate", "photometric": "rgb"},
    "pixels": {"planarconfig": "contig", "photometric": "rgb", "tile": (32, 32)},
}


@pytest.mark.parametrize("stored", [*STORED, "zarr", "zarr, channels first", "zarr, channels last", "OME-Zarr"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_windows_hold_the_images_pixels(
    stored: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (150, 97, 3)).astype(dtype)
    grey = stored in ("strips", "tiles", "zarr", "OME-Zarr")
    pixels = pixels[..., :1] if grey else pixels
    path = tmp_path / ("a.tif" if stored in STORED else "a.zarr")
    if stored in STORED:
        data = pixels[..., 0] if grey else np.moveaxis(pixels, -1, 0) if stored == "planes" else pixels
        save(path, data, **STORED[stored])
        monkeypatch.setattr(sources, "LARGE", 0)
        monkeypatch.setattr(sources, "read_image", None)  # nothing is decoded whole
    else:
        data = pixels[None, None, ..., 0] if grey else np.moveaxis(pixels, -1, 0) if "first" in stored else pixels
        place = path / "0" if stored.startswith("OME") else path
        if stored.startswith("OME"):
            group = zarr.create_group(str(path))
            group.attrs["ome"] = {"multiscales": [{"datasets": [{"path": "0"}, {"path": "1"}]}]}
        zarr.create_array(str(place), data=np.ascontiguousarray(data))
    source = open_source(path)
    assert (source.shape, source.dtype) == (pixels.shape, pixels.dtype)
    assert np.array_equal(source.window(0, 150, 0, 97), pixels)
    assert np.array_equal(source.window(31, 90, 5, 60), pixels[31:90, 5:60])
    assert np.array_equal(np.concatenate([source[at : at + 40] for at in range(0, 150, 40)]), pixels)


ODD: dict[str, dict[str, Any]] = {
    "orientation": {"extratags": [(274, "H", 1, 6)]},
    "white is zero": {"photometric": "miniswhite"},
    "palette": {"photometric": "palette", "colormap": np.arange(768).reshape(3, 256).astype(np.uint16) * 80},
    "two images": {"append": True},
    "cut off": {"cut": True},
}


@pytest.mark.parametrize("kind", ODD)
def test_other_tiffs_are_read_as_ever(
    kind: str, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    path, options = tmp_path / "a.tif", dict(ODD[kind])
    cut, append = options.pop("cut", False), options.pop("append", False)
    save(path, image, **options)
    if append:
        tifffile.imwrite(path, image, append=True)
    if cut:
        path.write_bytes(path.read_bytes()[: image.size // 2])
    if cut or append:
        with pytest.raises(DataError, match=r"a\.tif: expected"):
            open_source(path)
    else:
        assert np.array_equal(open_source(path).window(0, 9999, 0, 9999), read_image(path))


@pytest.mark.parametrize("fault", ["a tile is damaged", "not finite"])
def test_broken_pixels_are_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    pixels = np.ones((100, 90), np.float32)
    pixels[70, 80] = np.inf if fault == "not finite" else 1
    path = save(tmp_path / "a.tif", pixels, tile=(32, 32), compression="deflate")
    if fault != "not finite":
        with tifffile.TiffFile(path) as tiff:
            at = tiff.pages[0].dataoffsets[-1]
        content = bytearray(path.read_bytes())
        content[at : at + 8] = bytes(8)
        path.write_bytes(content)
    source = open_source(path)
    assert source.window(0, 32, 0, 32).all()
    with pytest.raises(DataError, match=r"a\.tif: expected (readable pixels|finite values), got"):
        moments(source)


@pytest.mark.parametrize("kind", ["png", "tif", "zarr", "tif, small tiles", "zarr, small tiles"])
def test_what_is_written_is_what_is_predicted(
    kind: str, segmenter: Segmenter, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    path = save(tmp_path / "a.tif", image, tile=(64, 64))
    mask, probabilities = expected_of(segmenter, image)
    kind, _, small = kind.partition(", ")
    tile, parts = (100, 4 * 6) if small else (TILE, 4)
    (tmp_path / "out").mkdir()
    seen: list[tuple[int, int]] = []
    wanted = Wanted(kind, probabilities=True)
    segmenter.write(path, tmp_path / "out/a", wanted, tile=tile, on_part=lambda *each: seen.append(each))
    assert seen == [(done, parts) for done in range(1, parts + 1)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"a{end}" for end in wanted.endings.values()}
    for name, end in wanted.endings.items():
        file = tmp_path / f"out/a{end}"
        assert is_ours(file)
        found = read_mask(file) if name == "labels" and kind != "zarr" else None
        if found is None:
            found = zarr.open(str(file), mode="r")[:] if file.suffix == ".zarr" else tifffile.imread(file)
        if name == "labels":
            assert np.array_equal(found, mask)
        else:
            np.testing.assert_allclose(np.moveaxis(found, -1, 0) if found.ndim == 3 else found[None], probabilities,
                                       atol=1e-6)  # fmt: skip


def test_classes_have_colours(image: np.ndarray, tmp_path: Path) -> None:
    segmenter = fastunet.load(untrained_run(tmp_path / "run", 3), "cpu")
    path = save(tmp_path / "a.tif", image)
    for kind in ("png", "tif"):
        segmenter.write(path, tmp_path / "labels", Wanted(kind))
        colours = np.array(Image.open(tmp_path / f"labels.{kind}").convert("RGB"))
        assert np.array_equal(colours, class_palette()[segmenter.predict(image)])
    assert len(np.unique(class_palette()[:9], axis=0)) == 9


SIZES: dict[str, tuple[dict[str, Any], PixelSize | None]] = {
    "none": ({}, None),
    "inch": ({"resolution": (300, 150), "resolutionunit": "INCH"}, PixelSize(1 / 300, 1 / 150, "inch")),
    "cm": ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, PixelSize(5e-5, 5e-5, "cm")),
    "ImageJ": ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "um"}}, PixelSize(0.25, 0.5, "um")),
    "OME": ({"ome": True, "metadata": {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}}, PixelSize(0.25, 0.5, "µm")),
    "another letter": (
        {"ome": True, "metadata": {"PhysicalSizeX": 1.5, "PhysicalSizeY": 1.5, "PhysicalSizeXUnit": "Å"}},
        PixelSize(1.5, 1.5, "Å"),
    ),
    "nothing": ({"ome": True, "metadata": {"PhysicalSizeX": 0, "PhysicalSizeY": 1}}, None),
    "no number": ({"resolution": ((0, 1), (0, 1)), "resolutionunit": "CENTIMETER"}, None),
    "no XML": ({"description": '<OME><Image Name="A & B"/></OME>', "metadata": None}, None),
}


def test_a_size_that_no_tiff_can_say_is_left_out(segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    size = {"PhysicalSizeX": 1e-10, "PhysicalSizeY": 1e-10, "PhysicalSizeXUnit": "m"}
    path = save(tmp_path / "a.tif", image, ome=True, metadata=size)
    segmenter.write(path, tmp_path / "b", Wanted("tif"))
    assert (pixel_size_of(path), pixel_size_of(tmp_path / "b.tif")) == (PixelSize(1e-10, 1e-10, "m"), None)


def test_of_a_pyramid_the_largest_level_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    pixels = noise((128, 96))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for step in (1, 2, 4):
            tiff.write(pixels[::step, ::step], tile=(32, 32), photometric="minisblack", metadata=None)
    source = open_source(tmp_path / "a.tif")
    assert source.shape == (128, 96, 1)
    np.testing.assert_array_equal(source.window(40, 80, 8, 90)[..., 0], pixels[40:80, 8:90])


@pytest.mark.parametrize("kind", SIZES)
def test_the_size_of_pixels_is_kept(kind: str, segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    options, expected = SIZES[kind]
    path = save(tmp_path / "a.tif", image, **options)
    assert pixel_size_of(path) == expected
    segmenter.write(path, tmp_path / "b", Wanted("tif", probabilities=True, instances="components"))
    for end in (".tif", "_probabilities.tif", "_objects.tif"):
        found = pixel_size_of(tmp_path / f"b{end}")
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found.unit == expected.unit
            np.testing.assert_allclose((found.x, found.y), (expected.x, expected.y), rtol=1e-5)


@pytest.mark.parametrize("instances", ["components", "watershed"])
def test_objects_are_measured_as_scikit_image_does(
    instances: str, segmenter: Segmenter, image: np.ndarray, tmp_path: Path
) -> None:
    """Of discs of two classes in a grid, of which some touch."""
    roifile = pytest.importorskip("roifile", reason="needs the extra imagej")
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    labels = ((y % 40 - 20) ** 2 + (x % 31 - 15) ** 2 < 16**2).astype(np.uint8)
    labels[(labels > 0) & (y > 160)] = min(2, segmenter.classes)
    wanted = Wanted("png", instances=instances, rois=True, overlay=True)
    ends = {name: tmp_path / f"b{end}" for name, end in wanted.endings.items()}
    segmenter._write_extras(segmenter.source_of(image), labels, wanted, ends)
    objects = tifffile.imread(ends["objects"])
    assert np.array_equal(objects > 0, labels > 0)
    with ends["table"].open() as file:
        rows = list(csv.DictReader(file))
    regions = skimage.measure.regionprops(objects, image[..., None])
    assert len(rows) == len(regions)
    parts, discs = skimage.measure.label(labels).max(), 8 * 14
    assert parts < len(regions) == discs if instances == "watershed" else len(regions) == parts
    for row, region in zip(rows, regions, strict=True):
        assert int(row["label"]) == region.label
        assert float(row["area"]) == region.area
        assert (float(row["centroid-0"]), float(row["centroid-1"])) == region.centroid
        assert float(row["perimeter"]) == region.perimeter
        assert float(row["intensity_mean-0"]) == region.intensity_mean[0]
        assert set(labels[objects == region.label].tolist()) == {int(row["class"])}
    for roi, region in zip(roifile.roiread(ends["rois"]), regions, strict=True):
        inside = skimage.measure.grid_points_in_poly(SIZE, roi.coordinates()[:, ::-1] - 0.5)
        assert np.array_equal(inside, objects == region.label)
    assert all(is_ours(ends[name]) for name in ("objects", "table", "rois", "overlay"))
    shown = np.array(Image.open(ends["overlay"])).astype(int)
    assert (np.ptp(shown[labels == 0], axis=1) == 0).all(), "background stays grey"
    assert (np.ptp(shown[labels > 0], axis=1) > 20).all()


@pytest.mark.parametrize("kind", ["png", "tif", "zarr"])
def test_what_fails_leaves_nothing(kind: str, segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", image)
    out = tmp_path / "out"
    out.mkdir()

    def fail(done: int, parts: int) -> None:
        if done == 3:
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        segmenter.write(path, out / "a", Wanted(kind, probabilities=True), tile=TILE, on_part=fail)
    assert list(out.iterdir()) == []


def test_an_error_of_the_writer_is_raised(segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", image)
    with pytest.raises(FileNotFoundError):
        segmenter.write(path, tmp_path / "missing/a", Wanted("tif"), tile=TILE)


class Failing(Writer):
    """It fails when all rows have come, as on a disk that is full by then."""

    def _write(self) -> None:
        for _ in self._rows():
            pass
        raise OSError("full")


class FailingAtOnce(Writer):
    def _write(self) -> None:
        raise OSError("full")


def written(kind: type[Writer], path: Path) -> str:
    """Write so many rows that the queue would be full, and return what is raised; "nothing returned" after 20 s."""
    message = ["nothing returned"]

    def write() -> None:
        try:
            with kind(path, (512 * GRID, 2), "uint8") as writer:
                for _ in range(512):
                    writer.put(np.zeros((GRID, 2), "uint8"))
                    time.sleep(1e-3)
                message[0] = "no error while it was written"
        except OSError as error:
            message[0] = f"{message[0]}, {error}" if "while" in message[0] else str(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(20)
    return message[0]


def test_a_writer_that_fails_ends(tmp_path: Path) -> None:
    assert written(FailingAtOnce, tmp_path / "a") == "full", "at the next part, not hours later"
    assert written(Failing, tmp_path / "a") == "no error while it was written, full"
    (tmp_path / "file").touch()
    for kind in WRITERS.values():
        assert "Not a directory" in written(kind, tmp_path / "file/a"), kind


def test_overlays_have_a_colour_for_each_class() -> None:
    grey = np.zeros((4, 4, 1), np.uint8)
    every = overlay_of(grey, np.array([[0, 1, 2, 3]] * 4, np.uint8))[0]
    assert len(np.unique(every, axis=0)) == 4
    for labels in ([0, 0, 2, 3], [1, 1, 3, 2], [3, 3, 3, 3], [0, 0, 0, 0]):
        found = overlay_of(grey, np.array([labels] * 4, np.uint8))[0]
        assert (found == every[labels]).all(), labels


@pytest.mark.parametrize("shape", ["corner", "hole", "ragged hole"])
def test_an_outline_is_that_of_the_whole_object(shape: str, tmp_path: Path) -> None:
    roifile = pytest.importorskip("roifile", reason="needs the extra imagej")
    objects = np.zeros((24, 24), np.uint16)
    objects[1:17, 1:17] = 1
    if shape == "corner":
        objects[17:20, 17:20] = 1
    elif shape == "hole":
        objects[4:12, 4:12] = 0
    else:
        objects[3:15, 3:15][np.indices((12, 12)).sum(0) % 2 == 0] = 0
    write_rois(tmp_path / "a.zip", objects)
    (roi,) = roifile.ImagejRoi.fromfile(tmp_path / "a.zip")
    x, y = roi.coordinates().T
    assert (x.min(), y.min(), x.max(), y.max()) == pytest.approx((1, 1, *2 * [objects.any(0).sum() + 1]))
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    filled = ndimage.binary_fill_holes(objects).sum()
    assert area == pytest.approx(filled, abs=2), "an outline cuts an eighth of a pixel off each corner"


def test_foreign_files_are_not_ours(tmp_path: Path, image: np.ndarray) -> None:
    save(tmp_path / "a.tif", image)
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("label,area\n1,2\n")
    zarr.create_array(str(tmp_path / "a.zarr"), data=image)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "b")
    assert not any(is_ours(file) for file in tmp_path.iterdir())


def test_images_are_found_by_names_folders_and_patterns(tmp_path: Path, image: np.ndarray) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "data/images/d.png", "odd[1].png"):
        save(tmp_path / name, image)
    zarr.create_array(str(tmp_path / "sub/e.zarr"), data=image)

    def found(*paths: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_images(*(tmp_path / path for path in paths))]

    assert found("b.png", "a.png", "b.png") == ["b.png", "a.png"]
    assert found("?.png", "sub") == ["a.png", "b.png", "sub/c.png", "sub/e.zarr"]
    assert found("data", "odd[1].png") == ["data/images/d.png", "odd[1].png"]
    with pytest.raises(DataError, match=r"x\*\.png: expected files that match the pattern, got none"):
        found("x*.png")


def test_the_command_line(image: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("roifile", reason="needs the extra imagej")
    run, out = untrained_run(tmp_path / "run", 3), tmp_path / "out"
    for name in "abc":
        save(tmp_path / f"{name}.tif", image)
    options = ("--probabilities", "--overlay", "--instances", "watershed", "--rois", "--tile", str(TILE), "--tta")
    result = fastunet_command("predict", run, tmp_path / "?.tif", "--out", out, *options, "--shard", "1/2")
    lines = [line.partition(":")[0] for line in result.stdout.splitlines() if line]
    assert lines == ["1 of 2", "2 of 2", f"2 predictions in {out}"]
    ends = (".tif", "_objects.csv", "_objects.tif", "_objects.zip", "_overlay.png", "_probabilities.tif")
    assert {p.name for p in out.iterdir()} == {f"{name}{end}" for name in "ac" for end in ends}
    expected = fastunet.load(run, "cpu").predict(image, tta=True)
    assert (read_mask(out / "c.tif") != expected).mean() < 1e-3, "another number of threads rounds otherwise"
    again = error_of("predict", run, tmp_path / "c.tif", "--out", out, "--overlay")
    assert "c.tif: expected nothing there, got a file (--overwrite replaces what fastunet wrote)" in again
    fastunet_command("predict", run, tmp_path / "c.tif", "--out", out, "--overwrite")
    assert (read_mask(out / "c.tif") != expected).mean() > 1e-2, "no views now"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shard", "3/2"], "shard: expected I/N with 1 <= I <= N, such as 2/4, got '3/2'"),
        (["--shard", "1/3"], "shard: expected at most the 2 images as N, got 3"),
        (["--rois"], "rois: expected instances, of which they are the outlines, got --instances none"),
        (["{folder}/sub/A.png"], "A.png: expected a name of its own for {out}/A.png, got that of {folder}/a.png too"),
        (
            ["{folder}/sub/a_overlay.png", "--overlay"],
            "a_overlay.png: expected a name of its own for {out}/a_overlay.png, got that of {folder}/a.png too",
        ),
        (
            ["{folder}/sub/A_objects.tif", "--instances", "components"],
            "expected a name of its own for {out}/A_objects.tif, got that of {folder}/a.png too",
        ),
        (
            ["{folder}/sub/A.png", "--shard", "1/2"],  # of which the second has b.png alone
            "A.png: expected a name of its own for {out}/A.png, got that of {folder}/a.png too",
        ),
        (
            ["{folder}/sub/B.png", "--shard", "1/2"],  # and the first does not have b.png
            "B.png: expected a name of its own for {out}/B.png, got that of {folder}/b.png too",
        ),
        (["{folder}/sub/" + 245 * "l" + ".png", "--overlay"], "_overlay.png: File name too long"),
    ],
)
def test_what_predict_cannot_do_is_one_line(
    arguments: list[str], words: str, image: np.ndarray, tmp_path: Path
) -> None:
    run = untrained_run(tmp_path / "run")
    for name in ("a.png", "b.png", *(argument[9:] for argument in arguments if argument.startswith("{folder}/"))):
        save(tmp_path / name, image)
    out = tmp_path / "out"
    given = [argument.format(folder=tmp_path) for argument in arguments]
    line = error_of("predict", run, tmp_path / "a.png", tmp_path / "b.png", *given, "--out", out)
    assert line.endswith(words.format(folder=tmp_path, out=out))
    assert not out.exists()
