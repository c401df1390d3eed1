"""What is installed is what is here: the wheel's files, its version, and the images' recipes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fastunet

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# A folder of the repository, and the package it is installed as.
PACKAGES = {"fastunet": "fastunet", "kernels": "fastunet.kernels", "benchmarks": "fastunet.benchmarks"}
# Imported from the wheel's files alone, each module that needs no GPU and nothing but the extra `train`.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import fastunet
names = ["fastunet", *(m.name for m in pkgutil.walk_packages(fastunet.__path__, "fastunet."))]
modules = {name: importlib.import_module(name) for name in names if not name.endswith("__main__")}
print(json.dumps({name: module.__file__ for name, module in modules.items()}))
"""


def packages() -> dict[str, Path]:
    """Every package of the repository, by the name it is installed under."""
    found = {}
    for folder, name in PACKAGES.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found[".".join([name, *file.parent.relative_to(ROOT / folder).parts])] = file.parent
    return found


def test_every_package_is_installed() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages())


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastunet.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastunet.__version__)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist as pip does, without the environment of its own."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "would be ignored" not in result.stdout + result.stderr
    return out / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution, as `make dist` builds it."""
    pytest.importorskip("setuptools", minversion="77", reason="needs the setuptools that pyproject.toml names")
    folder = tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "fastunet-demo")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder)


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {f"{name.replace('.', '/')}/{f.name}" for name, path in packages().items() for f in path.glob("*.py")}
    expected |= {f"fastunet/kernels/tuned/{file.name}" for file in (ROOT / "kernels/tuned").glob("*.json")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"fastunet-{fastunet.__version__}.dist-info/METADATA").decode()
    assert names == expected | {"fastunet/py.typed"}
    assert f"\nVersion: {fastunet.__version__}\n" in metadata


@pytest.mark.slow
def test_its_modules_find_each_other(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which kernels import")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    files = json.loads(result.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files.values())
    assert {"fastunet.measuring", "fastunet.kernels.conv3x3", "fastunet.benchmarks.unet"} <= files.keys()


# --- images ---

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_is_built_of_exists(file: Path) -> None:
    steps = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    for name, text in steps:
        words = shlex.split(text) if name in ("COPY", "RUN") else []
        if name == "COPY":
            assert all((ROOT / source).exists() for source in words[:-1]), text
        if "install" in words and "pip" in words:
            assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file(), text
            for extra in re.findall(r"\.\[(.*?)\]", text):
                assert set(extra.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), text
            for pin in re.findall(r"torch==\S+", text):
                assert pin in (ROOT / "constraints.txt").read_text().splitlines(), text
        if name == "ENTRYPOINT":
            assert json.loads(text)[0] in PROJECT["project"]["scripts"]
    assert "ENTRYPOINT" in dict(steps)


def test_images_leave_out_what_is_not_tracked() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "dist"} <= set(left_out)
    assert len(DOCKERFILES) == 2
