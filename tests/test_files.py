"""Files appear under their name only when they are complete."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from fastunet.checks import DataError
from fastunet.files import check_apart, write_json, written_whole


@pytest.mark.parametrize("name", ["file.json", "n" * 250 + ".json", "file." + "s" * 250, "\u00e9" * 125 + ".txt"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, [1])
    assert json.loads((tmp_path / name).read_text()) == [1]
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("chosen", [0o600, 0o777])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_permissions_are_those_of_any_new_file(tmp_path: Path, chosen: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with written_whole(tmp_path / "x") as temporary:
            temporary.unlink()  # some writers put a file of their own in its place
            temporary.touch()
            temporary.chmod(chosen)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "x").exists()))
    write_json(tmp_path / "x", 1)
    assert synced == [False]


def test_two_at_once_do_not_meet_and_writers_see_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with written_whole(path) as first, written_whole(path) as second:
        assert first.suffix == ".png"
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"


def test_a_folder_of_masks_is_no_place_for_results(tmp_path: Path) -> None:
    (masks := tmp_path / "masks" / "a").mkdir(parents=True)
    for folder in (masks, masks.parent):
        with pytest.raises(DataError, match="expected a folder apart from the images and masks"):
            check_apart(folder, [masks])
    check_apart(tmp_path, [masks])
