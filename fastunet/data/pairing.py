"""Find images and their masks in a folder, however it is laid out, and share them out for training and validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastunet.checks import ConfigError, DataError, some_of
from fastunet.data.decoding import count_sections
from fastunet.data.images import list_images, read_codes, read_image
from fastunet.data.layout import DataOptions
from fastunet.data.mask_folders import files_in_order, is_folder, read_objects, with_folders
from fastunet.data.outlines import SUFFIXES, annotation_files, check_options, draw, names_of
from fastunet.data.sources import Source, open_source, source_of_array
from fastunet.data.yolo import DATA_YAML, folders_of, names_in
from fastunet.files import check_apart

# Names of the folders of a data set that is split already; those of "test" belong to neither side.
SIDES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Pair:
    """One image and its mask; `stem` is the file name that they share, without suffix, below their folders."""

    image: Path
    mask: Path  # a file; or a folder: of a mask for each object, or of one for each section
    stem: str
    side: str = ""  # of a split that the folders make: train or val
    section: int | None = None  # of both files, where they hold several; or of the image, and its place in the folder
    names: tuple[str, ...] = ()  # of the classes but the background's, where the mask is a file of outlines
    listed: tuple[str, ...] = ()  # YOLO's names by number, where the data are named by its YAML

    @property
    def is_drawn(self) -> bool:
        """Whether the mask is a file of outlines."""
        return self.mask.suffix.lower() in SUFFIXES

    @property
    def mask_name(self) -> str:
        """Name the mask in an error."""
        return str(self.mask) if self.section is None else f"{self.mask} (section {self.section})"

    def read_image(self) -> np.ndarray:
        """Return the image [H, W, C]; see `fastunet.data.read_image`."""
        return read_image(self.image, self.section)

    def open_image(self) -> Source:
        """Open the image, to be read in windows: from the disk where it is a large TIFF."""
        if self.section is None and self.image.is_file():
            return open_source(self.image)
        return source_of_array(self.read_image(), self.image)

    def read_codes(
        self, size: tuple[int, int] | None = None, *, colours: bool = False, any_numbers: bool = False
    ) -> tuple[np.ndarray, bool]:
        """Return the values of the mask [H, W], and whether they are colours; see `fastunet.data.images.read_codes`.

        `size` is the image's, height and width, where it has been read: outlines are drawn on as many pixels.
        """
        if self.names:
            height, width = size or self.read_image().shape[:2]
            return draw(self.mask, self.stem, self.names, (height, width), self.listed), False
        file, section = self.mask, self.section
        if is_folder(file):
            if section is None:
                return read_objects(file), False
            file, section = files_in_order(file)[section], None
        return read_codes(file, section, colours=colours, any_numbers=any_numbers)


def find_pairs(root: str | Path, options: DataOptions | None = None, names: tuple[str, ...] = ()) -> list[Pair]:
    """Pair images with masks by stem, sorted by stem: those of `root/images` with those of `root/masks`, if not else.

    Folders within are searched too. Where `root` holds train/ and val/ instead, each with images and masks, or images
    and masks hold them, they are the two sides of the split. Masks may be files of outlines, or one file of COCO. Where
    the masks of an image lie in a folder of its name, they are of one object or one section each; so may `root` hold a
    folder for each image, with images/ and masks/. `root` may be YOLO's data.yaml, which names them.

    Args:
        names: of the classes of outlines, where a model knows them already; none: all that occur.

    Raises:
        DataError: a folder is missing or without images, two files share a stem, or stems without a partner.
        ConfigError: options that contradict each other.
    """
    root, options = Path(root), options or DataOptions()
    options.check()
    pairs = [pair for place in _roots(root, options) for pair in _pairs_in(*place)]
    sides = {pair.side for pair in pairs}
    stems = [pair.stem for pair in pairs]
    if len(set(stems)) < len(stems):
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise DataError(f"{root}: expected one image for each stem, of sections too, got two of {some_of(twice)}")
    if drawn := [pair for pair in pairs if pair.is_drawn]:
        check_options(options, drawn[0].mask)
        listed = tuple(names_in(root)) if root.suffix.lower() in YAML else ()
        found = names_of([pair.mask for pair in drawn], names, listed)
        pairs = [replace(pair, names=found, listed=listed) for pair in pairs]
    if "train" in sides:  # what is in other folders, such as test/, is kept out of training
        pairs = [pair for pair in pairs if pair.side]
    return sorted(pairs, key=lambda pair: pair.stem)


def check_outside(out: Path, root: str | Path, options: DataOptions | None, pairs: Sequence[Pair]) -> None:
    """Raise DataError where `out` is a folder of the images or masks of `find_pairs`, or within one that it searches.

    A picture that is written there would be taken for an image the next time.
    """
    check_apart(out, [file for pair in pairs for file in (pair.image, pair.mask)])
    for _, folder, how in _roots(Path(root), options or DataOptions()):
        for searched in (folder / how.images, folder / how.masks):
            for place in (out.resolve(), *out.resolve().parents):
                if place.exists() and searched.exists() and os.path.samefile(place, searched):
                    raise DataError(f"{out}: expected a folder apart from the images and masks, got one in {searched}")


def _roots(root: Path, options: DataOptions) -> list[tuple[str, Path, DataOptions]]:
    """Give the folders that hold images and masks, how each is read, and what its stems begin with."""
    if root.suffix.lower() in YAML:
        sides = folders_of(root)
        return [
            (f"{side}/", root.parent, replace(options, images=str(images.resolve()), masks=str(labels.resolve())))
            for side, (images, labels) in sides.items()
        ]
    if os.path.lexists(root / options.images) or not os.path.isdir(root):
        return [("", root, options)]
    folders = [folder for folder in sorted(root.iterdir()) if (folder / options.images).is_dir()]
    folders = [folder for folder in folders if folder.name.casefold() in SIDES] or folders
    return [(f"{folder.name}/", folder, options) for folder in folders] or [("", root, options)]


def _pairs_in(prefix: str, root: Path, options: DataOptions) -> list[Pair]:
    images_folder, masks_folder, suffix = root / options.images, root / options.masks, options.mask_suffix
    together = images_folder.resolve() == masks_folder.resolve()
    try:
        images = list_images(images_folder, nested=True)
        masks = _masks_in(masks_folder, images, together=together and not suffix)
    except DataError as error:
        raise DataError(f"{error}{_hint_of_folders(root)}") from error
    if prefix and prefix[:-1].casefold() not in SIDES and len(images) == 1 and not masks.keys() & images.keys():
        (image,) = images.values()  # in a folder of its own, with a mask for each object
        return [Pair(image, masks_folder, prefix[:-1])]
    is_drawn = any(file.suffix.lower() in SUFFIXES for file in masks.values())
    if together and not is_drawn:
        if not suffix:
            raise ConfigError(f"mask_suffix: expected what tells masks from images in {images_folder}, got nothing")
        images = {stem: file for stem, file in images.items() if not stem.endswith(suffix)}
    masks = with_folders(images, masks)
    if suffix:
        names = [file.name for file in masks.values()]
        masks = {stem.removesuffix(suffix): file for stem, file in masks.items() if stem.endswith(suffix)}
        if not masks:
            raise DataError(f"{masks_folder}: expected masks whose stems end in {suffix!r}, got {some_of(names)}")
    for folder, own, other in ((masks_folder, images, masks), (images_folder, masks, images)):
        alone = [file.name for stem, file in own.items() if stem not in other]
        if alone:
            raise DataError(
                f"{folder}: expected a file for each of {len(own)} stems, "
                f"got none for {len(alone)}: {some_of(alone)}{_hint_of_stems(images, masks)}"
            )
    return [pair for stem in images for pair in _sections_of(images[stem], masks[stem], prefix + stem)]


def _masks_in(folder: Path, images: dict[str, Path], together: bool) -> dict[str, Path]:
    """Map stem to mask: images, or files of outlines where there are no images, or only those `together` with them."""
    if folder.is_file() and folder.suffix.lower() == ".json":
        return annotation_files(folder, images)
    try:
        masks = list_images(folder, nested=True)
    except DataError:
        masks = {}
        if not os.path.isdir(folder) or not annotation_files(folder, images):
            raise
    return annotation_files(folder, images) or masks if together or not masks else masks


def _sections_of(image: Path, mask: Path, stem: str) -> list[Pair]:
    """Give a pair for each section of two stacks; where the mask is one image, so is the other, of several channels."""
    if is_folder(mask):
        count, masks = count_sections(image), len(files_in_order(mask))
        if count > 1 and count != masks:
            raise DataError(f"{mask}: expected {count} masks, one for each section of {image.name}, got {masks}")
    else:
        count = 1 if mask.suffix.lower() in SUFFIXES else count_sections(mask)
        if count > 1 and (images := count_sections(image)) != count:
            raise DataError(f"{mask}: expected {images} sections as of {image.name}, got a stack of {count} sections")
    first, slash, _ = stem.partition("/")
    side = SIDES.get(first.casefold(), "") if slash else ""
    if count == 1:
        return [Pair(image, mask, stem, side)]
    return [Pair(image, mask, section_name(stem, n, count), side, n) for n in range(count)]


def section_name(stem: str, section: int, count: int) -> str:
    """Return the stem of one section of `count`, such as stack_003."""
    return f"{stem}_{section:0{max(3, len(str(count - 1)))}d}"


def _hint_of_folders(root: Path) -> str:
    """Name the folders that are there instead of images/ and masks/."""
    if not os.path.isdir(root):
        return ""
    if (root / DATA_YAML).is_file():
        return f": YOLO's {DATA_YAML} may be DATA: {root / DATA_YAML}"
    names = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    return f": the folders there are {some_of(names)}; name yours by --images and --masks" if names else ""


def _hint_of_stems(images: dict[str, Path], masks: dict[str, Path]) -> str:
    """Say what all stems of masks have beyond those of images, if it is one thing."""
    beyond = {next((mask[len(stem) :] for stem in images if mask.startswith(stem)), "") for mask in masks}
    return f": --mask-suffix {beyond.pop()}" if len(beyond) == 1 and beyond != {""} else ""


def split(
    pairs: Sequence[Pair], val_fraction: float, seed: int | None = None, fold: tuple[int, int] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Split into training and validation pairs, each sorted by stem; the same stems and seed give the same split.

    Pairs that folders have split already, into train/ and val/, stay as they are. Else the last stems are for
    validation without a seed, with one a random choice. In a stack of sections, a film or the fields of one slide,
    neighbours are nearly the same picture: a random split tests on what was trained on. At least one pair stays on
    either side, unless `val_fraction` is 0. A `fold` (I, N) keeps out the I-th of N equal parts instead of the last.

    Raises:
        ConfigError: `val_fraction` outside [0, 1).
        DataError: fewer than two pairs to share out, or than folds; folds of pairs that are split already.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction: expected 0 <= fraction < 1, got {val_fraction}")
    ordered = sorted(pairs, key=lambda pair: pair.stem)
    if {pair.side for pair in ordered} == {"train", "val"}:
        if fold is not None:
            raise DataError("data: expected images that no folders train/ and val/ have split, for folds of them")
        return [pair for pair in ordered if pair.side == "train"], [pair for pair in ordered if pair.side == "val"]
    if val_fraction == 0 and fold is None:
        return ordered, []
    if len(ordered) < 2:
        names = ", ".join(str(pair.image) for pair in ordered) or "none"
        raise DataError(f"data: expected at least 2 pairs to keep one for validation, got {len(ordered)} ({names})")
    count = min(max(round(len(ordered) * val_fraction), 1), len(ordered) - 1)
    last = np.arange(len(ordered))[::-1]
    order = last if seed is None else np.random.default_rng(seed).permutation(len(ordered))
    if fold is not None and fold[1] > len(ordered):
        raise DataError(f"data: expected at least {fold[1]} pairs for as many folds, got {len(ordered)}")
    chosen = set((order[:count] if fold is None else np.array_split(order[::-1], fold[1])[fold[0] - 1]).tolist())
    train = [pair for index, pair in enumerate(ordered) if index not in chosen]
    return train, [ordered[index] for index in sorted(chosen)]
