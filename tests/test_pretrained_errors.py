"""What UNet.from_pretrained and save_pretrained refuse: files that are broken or bad, and other models' weights."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="needs the extra train")

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from unet_weights import SMALL, assert_identical

import fastunet
from fastunet import UNet
from fastunet.checks import ConfigError, DataError, DtypeError, MissingPackageError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", (4, 8), r"features: expected \(4, 8, 16\), as the weights have it, got \(4, 8\)"),
        ("norm", None, "norm: expected 'batch', as the weights have it, got None"),
        ("head", "tanh", "head: expected one of None, 'sigmoid', 'softmax', got 'tanh'"),
        ("widths", (4, 8), "expected options among in_channels, .*, head, got 'widths'"),
    ],
)
def test_options_that_contradict_the_weights(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet.from_pretrained(UNet(1, 2, features=SMALL).state_dict(), **{name: value})


def test_options_that_agree_are_welcome() -> None:
    model = UNet(1, 2, features=(4, 8, 11), upsample="bilinear", norm="instance", activation="leaky_relu")
    assert_identical(UNet.from_pretrained(model.state_dict(), **model.config), model)
    assert_identical(UNet.from_pretrained(model.state_dict(), **{**model.config, "features": [4, 8, 11]}), model)
    with pytest.raises(ConfigError, match=r"features: expected \(4, 8, 16\), .* got \(4, 7, 16\)"):
        UNet.from_pretrained(model.state_dict(), features=(4, 7, 16))


def without(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in UNet(1, 2, features=SMALL).state_dict().items() if key != name}


def changed(name: str, t: object) -> dict[str, object]:
    return {**UNet(1, 2, features=SMALL).state_dict(), name: t}


DOWN1 = "down1.maxpool_conv.1.double_conv"
WRONG_STATES = {
    "unknown": (
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)).state_dict(),
        r"milesial/Pytorch-UNet.*/brain-segmentation-pytorch.*got 4 tensors: 0.weight, 0.bias, 1.weight, 1.bias",
    ),
    "empty": ({}, "got 0 tensors: none"),
    "missing": (
        without("up1.up.bias"),
        r"the 66 tensors of UNet\(in_channels=1.* 1 missing: up1.up.bias; 0 unknown: none",
    ),
    "shape": (changed("up1.up.weight", torch.ones(16, 8, 3, 3)), r"up1.up.weight: .* \[16, 8, 2, 2\].*\[16, 8, 3, 3\]"),
    "rank": (changed("outc.conv.weight", torch.ones(4)), r"outc.conv.weight: expected a 4-D tensor, got \[4\]"),
    "without a level": (without(f"{DOWN1}.3.weight"), f"{DOWN1}.3.weight: expected a 4-D tensor, got none"),
    "bias of another size": (changed("inc.double_conv.0.bias", torch.ones(3)), "1 unknown: inc.double_conv.0.bias"),
    "object": (changed("epoch", 5), "expected a state dict of tensors, got int 'epoch'"),
    "number as name": ({0: torch.ones(1)}, "got Tensor 0"),
    "not a dict": (nn.Conv2d(1, 1, 1), "expected a path or a state dict, got Conv2d"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_states_of_other_models(name: str) -> None:
    state, message = WRONG_STATES[name]
    with pytest.raises(DataError, match=message):
        UNet.from_pretrained(state)


def test_dtypes_that_no_model_has(tmp_path: Path) -> None:
    mixed = changed("outc.conv.bias", torch.ones(2, dtype=torch.float16))
    with pytest.raises(
        DtypeError, match=r"of one dtype, or from_pretrained\(dtype=\), got torch.float16, torch.float32"
    ):
        UNet.from_pretrained(mixed)
    model = UNet(1, 1, features=(2, 4))
    model.inc.half()
    with pytest.raises(DtypeError, match="save_pretrained: expected weights of one dtype"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert UNet.from_pretrained(mixed, dtype=torch.float32).outc.conv.bias.dtype == torch.float32
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(DtypeError, match=f"expected weights in torch.float16.*got {dtype}"):
            UNet.from_pretrained(changed("outc.conv.bias", torch.ones(2).to(dtype)), dtype=torch.float32)
        with pytest.raises(DtypeError, match=f"got {dtype}"):
            UNet.from_pretrained(UNet(1, 2, features=SMALL).state_dict(), dtype=dtype)


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("suffix", "force"), [(".pt", None), ("", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")])
def test_no_pickle_is_run(suffix: str, force: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if force is not None:
        monkeypatch.setenv(force, "1")
    file, made = tmp_path / f"weights{suffix}", tmp_path / "made"
    torch.save({**UNet(1, 2, features=SMALL).state_dict(), "mask_values": Malicious(made)}, file)
    with pytest.raises(DataError, match=r"a file that it refuses: it holds \S*\.mkdir. Nothing of it was run") as error:
        UNet.from_pretrained(file)
    assert "weights_only=False" not in str(error.value)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "the file is not what this test is about"


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    state = {name: t.contiguous() for name, t in UNet(1, 1, features=(2, 4)).state_dict().items()}
    torch.save(state, tmp_path / "good.pth")
    save_file(state, tmp_path / "good.safetensors")
    zipped, tensors = (tmp_path / "good.pth").read_bytes(), (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "folder").mkdir()
    torch.save([1, 2], tmp_path / "list.pth")
    contents = {
        "garbage.pth": (b"garbage", "it is no pickle of tensors"),
        "empty.pth": (b"", "expected a whole file of torch.save, got EOFError"),
        "cut.pth": (zipped[:-100], "expected a whole file of torch.save, got "),
        "cut.safetensors": (tensors[:-4], "expected a whole safetensors file"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    messages = {name: message for name, (_, message) in contents.items()} | {
        "none.pth": "expected a file of weights, or a folder with model.safetensors, got no such file",
        "folder": "model.safetensors: expected a file of weights",
        "list.pth": "expected a state dict, got list",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=message) as error:
            UNet.from_pretrained(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
    assert_identical(UNet.from_pretrained(tmp_path / "good.pth"), UNet.from_pretrained(tmp_path / "good.safetensors"))


def expanded(folder: Path) -> Path:
    """144 GiB of one value."""
    state = UNet(1, 1, features=(2, 4)).state_dict()
    state["outc.conv.weight"] = torch.zeros(1).expand(1, 2, 144 * 2**27, 1)
    torch.save({"model": state}, folder / "a.pth")
    return folder / "a.pth"


def compressed(folder: Path) -> Path:
    torch.save({"inc.double_conv.0.weight": torch.zeros(2**22)}, folder / "b.pth")
    with (
        zipfile.ZipFile(folder / "b.pth") as whole,
        zipfile.ZipFile(folder / "a.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    return folder / "a.pth"


def headed(folder: Path) -> Path:
    header = {"outc.conv.weight": {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}}
    text = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (expanded, "expected tensors within the"),
        (compressed, "expected tensors as torch.save leaves them"),
        (headed, "expected a whole safetensors file"),
    ],
)
def test_files_that_claim_more_than_they_hold_are_refused(
    bomb: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"{bomb(tmp_path)}: {message}"):
        UNet.from_pretrained(bomb(tmp_path))


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    model = UNet(1, 2, features=(2, 4), head="sigmoid")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model": {**model.config, "features": [2, 4]}, "fastunet": fastunet.__version__}
    cases = {
        "{": "expected the config.json of a fastunet model or run, got JSONDecodeError",
        '{"model": 3}': "expected the config.json of a fastunet model or run, got TypeError",
        '{"model_type": "bert"}': r"expected the config.json of a fastunet model or run, got KeyError\('model'\)",
        '{"model": {"dropout": 0.5}}': r"got KeyError\('dropout'\)",
        '{"model": {"norm": null}}': "norm: expected 'batch', as the weights have it, got None",
    }
    for text, message in cases.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config\.json.*" + message):
            UNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert UNet.from_pretrained(tmp_path).config == {**model.config, "head": None}


def test_without_safetensors_torchs_files_still_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UNet(1, 1, features=(2, 4))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_identical(UNet.from_pretrained(tmp_path / "model.pth"), model)
    for call in (lambda: UNet.from_pretrained(tmp_path), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(MissingPackageError, match=r"needs safetensors: pip install 'fastunet\[train\]'"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.pth", "model.safetensors"]
