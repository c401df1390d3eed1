"""`fastunet predict`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastunet.checks import ConfigError, DataError
from fastunet.files import check_apart, check_folder, check_replaceable
from fastunet.train.config import TILE

from .shared import DeviceOption, OverwriteOption, RunArgument, TileOption, TtaOption, bar, console, load, option, track

NIFTI = "nii.gz"


def predict(
    run: RunArgument,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES", help="Images, folders of images, or patterns such as 'a/*.tif'."),
    ],
    out: Annotated[Path, option("output", "Folder for the predictions.")],
    format: Annotated[
        Literal["auto", "png", "tif", "zarr"],
        option(
            "output", "Format of the labels: auto is tif for TIFF, zarr for Zarr, nii.gz for NIfTI, png for all others."
        ),
    ] = "auto",
    probabilities: Annotated[
        bool, option("output", "Also write OUT/<stem>_probabilities, float32.", "--probabilities")
    ] = False,
    overlay: Annotated[
        bool, option("output", "Also write OUT/<stem>_overlay.png: the labels over the image.", "--overlay")
    ] = False,
    instances: Annotated[
        Literal["none", "components", "watershed"],
        option("objects", "Also number the objects in OUT/<stem>_objects.tif, and measure them in a CSV of that name."),
    ] = "none",
    rois: Annotated[
        bool, option("objects", "With --instances: also write the outlines as ROIs for ImageJ.", "--rois")
    ] = False,
    tta: TtaOption = False,
    tile: TileOption = TILE,
    shard: Annotated[
        str, option("hardware", "Predict only every N-th image from the I-th on, as one of N processes.", metavar="I/N")
    ] = "1/1",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write OUT/<stem>.png (or .tif, .zarr) for each image: labels, or 0 and 255 where there is one class."""
    from fastunet.data import find_images
    from fastunet.data.images import suffix_of
    from fastunet.data.pairing import section_name
    from fastunet.data.sources import ZARR
    from fastunet.inference.outputs import Wanted, is_ours

    if rois and instances == "none":
        raise ConfigError("rois: expected instances, of which they are the outlines, got --instances none")
    if rois:
        import roifile  # noqa: F401  an extra, asked for before any work
    files = find_images(*images)
    own = _sharded(files, shard)
    check_folder(out)
    check_apart(out, files)
    segmenter = load(run, device, tile)
    kinds = {".tif": "tif", ".tiff": "tif", ZARR: "zarr", ".nii": NIFTI, ".nii.gz": NIFTI}
    jobs: list[tuple[Path, int | None, str, Wanted]] = []
    places: dict[str, Path] = {}  # that are taken, in lower case: some systems tell no other
    for file in files:
        suffix = suffix_of(file)
        stem = file.name.removesuffix(suffix) if suffix else file.stem
        kind = kinds.get(suffix.lower(), "png") if format == "auto" else format
        wanted = Wanted(kind, probabilities, overlay, instances, rois)
        if kind == NIFTI and len(wanted.endings) > 1:
            raise ConfigError(f"format: expected png, tif or zarr for more than the labels of {file}, got auto")
        sections = [None] if kind == NIFTI else segmenter.sections_of(file)
        for section in sections:
            name = stem if section is None else section_name(stem, section, len(sections))
            for path in (out / f"{name}{ending}" for ending in wanted.endings.values()):
                # Of other shards, too: they write at the same time.
                if (other := places.setdefault(path.name.casefold(), file)) is not file:
                    raise DataError(f"{file}: expected a name of its own for {path}, got that of {other} too")
                if file in own:
                    check_replaceable(path, overwrite, is_ours)
            if file in own:
                jobs.append((file, section, name, wanted))
    for file in track(own, "checking"):
        segmenter.source_of(file, segmenter.sections_of(file)[0])
    out.mkdir(parents=True, exist_ok=True)
    with bar("predicting", transient=True) as show:
        for number, (file, section, name, wanted) in enumerate(jobs, 1):
            if not console.is_terminal:  # where a bar would show nothing
                console.print(f"{number} of {len(jobs)}: {file}", soft_wrap=True)
            show(0, 1, f"{file.name} ({number} of {len(jobs)}), tiles")
            if wanted.kind == NIFTI:
                segmenter.write_volume(file, out / f"{name}.{NIFTI}", tile=tile, tta=tta, on_part=show)
            else:
                segmenter.write(file, out / name, wanted, section=section, tile=tile, tta=tta, on_part=show)
    console.print(f"{len(jobs)} predictions in {out}", soft_wrap=True)


def _sharded(files: list[Path], shard: str) -> dict[Path, None]:
    """Take every N-th file from the I-th on, of "I/N", in order."""
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", shard)
    index, count = map(int, found.groups()) if found else (2, 1)
    if index > count:
        raise ConfigError(f"shard: expected I/N with 1 <= I <= N, such as 2/4, got {shard!r}")
    if count > len(files):
        raise ConfigError(f"shard: expected at most the {len(files)} images as N, got {count}")
    return dict.fromkeys(files[index - 1 :: count])
