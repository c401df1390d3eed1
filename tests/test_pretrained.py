"""UNet.from_pretrained and save_pretrained: other people's checkpoints, our own, and files that are broken or bad."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="needs the extra train")

import torch
from test_unet import OPTIONS
from torch import Tensor, nn
from unet_weights import SMALL, assert_identical

import fastunet
from fastunet import pretrained
from fastunet.checks import ConfigError, DataError
from fastunet.reference import DoubleConv, ReferenceUNet

UNet = fastunet.UNet


# --- models of the known formats, with random statistics ---


def milesial(channels: int = 1, classes: int = 2, *, bias: bool = False, **options: Any) -> ReferenceUNet:
    """The reference model, whose names are milesial's; `bias`: of convolutions before a norm, as it once had."""
    model = ReferenceUNet(channels, classes, **{"features": SMALL, **options})
    for name, conv in model.named_modules():
        if bias and re.search(r"double_conv\.[03]$", name):
            conv.bias = nn.Parameter(torch.empty(conv.out_channels))
    return randomised(model)


class BrainSegmentation(nn.Module):
    """Names and joining order, [up, skip], of mateuszbuda/brain-segmentation-pytorch."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()

        def block(a: int, b: int, name: str) -> nn.Module:
            names = [name + kind for kind in ("conv1", "norm1", "relu1", "conv2", "norm2", "relu2")]
            layers = DoubleConv(a, b, b, norm="batch", activation="relu").double_conv
            return nn.ModuleDict(zip(names, layers, strict=True))

        for i in range(4):
            a, b = (width << (i - 1) if i else channels), width << i
            self.add_module(f"encoder{i + 1}", block(a, b, f"enc{i + 1}"))
            self.add_module(f"upconv{i + 1}", nn.ConvTranspose2d(2 * b, b, 2, 2))
            self.add_module(f"decoder{i + 1}", block(2 * b, b, f"dec{i + 1}"))
        self.bottleneck = block(width * 8, width * 16, "bottleneck")
        self.conv = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        def run(name: str, x: Tensor) -> Tensor:
            return nn.Sequential(*self.get_submodule(name).children())(x)

        skips = []
        for i in range(1, 5):
            skips.append(run(f"encoder{i}", x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = run("bottleneck", x)
        for i in range(4, 0, -1):
            x = run(f"decoder{i}", torch.cat([self.get_submodule(f"upconv{i}")(x), skips.pop()], dim=1))
        return self.conv(x).sigmoid()


def randomised(model: Any) -> Any:
    """In eval mode and float64, no parameter or statistic as it was made, and outputs not all alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 3  # as made, each layer would halve what the image says
            if module.bias is not None:
                module.bias.data.uniform_(-1.0, 1.0)
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            for t in (module.weight, module.running_var, module.bias, module.running_mean):
                if t is not None:
                    t.data.uniform_(0.5, 1.5) if t is module.running_var else t.data.uniform_(-1.0, 1.0)
            if module.track_running_stats:
                module.num_batches_tracked.fill_(7)
    return model.double().eval()


def assert_equal_outputs(loaded: UNet, source: nn.Module, channels: int) -> None:
    x = torch.randn(2, channels, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = source(x), loaded(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (1, {"features": (6, 12, 24, 48, 96)}),
        (4, {"bias": True}),
        (1, {"upsample": "bilinear", "bias": True}),
        (4, {"upsample": "bilinear", "features": (5, 10, 20, 40)}),
    ],
)
def test_milesials_outputs(classes: int, options: dict, tmp_path: Path) -> None:
    source, file = milesial(3, classes, **options), tmp_path / "checkpoint_epoch5.pth"
    torch.save({**source.state_dict(), "mask_values": [0, 255]}, file)
    loaded = UNet.from_pretrained(file)
    assert not loaded.training
    assert loaded.config == source.config
    assert_equal_outputs(loaded, source, 3)
    # In training the batch's mean takes any bias off: the same outputs, and the same running variance after them.
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(loaded.train()(x), source.train()(x), rtol=1e-8, atol=1e-8)
    index = "inc.double_conv.1.running_var"
    torch.testing.assert_close(loaded.state_dict()[index], source.state_dict()[index], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("channels", "classes"), [(3, 1), (1, 4)])
def test_brain_segmentations_outputs(channels: int, classes: int, tmp_path: Path) -> None:
    source = randomised(BrainSegmentation(channels, classes, 8))
    torch.save(source.state_dict(), tmp_path / "unet.pt")
    loaded = UNet.from_pretrained(tmp_path / "unet.pt")
    assert loaded.config == UNet(channels, classes, features=(8, 16, 32, 64, 128), head="sigmoid").config
    assert_equal_outputs(loaded, source, channels)
    logits = UNet.from_pretrained(source.state_dict(), head=None)
    assert_equal_outputs(nn.Sequential(logits, nn.Sigmoid()), source, channels)
    without = {name: t for name, t in source.state_dict().items() if "upconv4" not in name}
    with pytest.raises(DataError, match=r"2 missing: up1.up.weight, up1.up.bias; 0 unknown"):
        UNet.from_pretrained(without)


@pytest.mark.parametrize(
    ("prefix", "nest"),
    [
        ("module.", None),
        ("_orig_mod.", "state_dict"),
        ("_orig_mod.module.", "model"),
        ("model.", "model_state_dict"),
        ("", "net"),
    ],
)
def test_wrappers_and_nests(prefix: str, nest: str | None, tmp_path: Path) -> None:
    source = milesial()
    others = {"mask_values": [0, 1], "n_averaged": torch.tensor(1)}  # of milesial's train.py, and AveragedModel
    state = {**{prefix + name: t for name, t in source.state_dict().items()}, **others}
    torch.save(state if nest is None else {nest: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    assert_equal_outputs(UNet.from_pretrained(tmp_path / "c.pth"), source, 1)


@pytest.mark.parametrize("source", [milesial, lambda: randomised(BrainSegmentation(1, 1, 2))])
def test_missing_batch_counts_are_zero(source: Callable[[], nn.Module]) -> None:
    state = source().state_dict()
    assert UNet.from_pretrained(state).inc.double_conv[1].num_batches_tracked == 7
    without = {name: t for name, t in state.items() if "num_batches_tracked" not in name}
    counts = [t for name, t in UNet.from_pretrained(without).state_dict().items() if "num_batches_tracked" in name]
    assert counts
    assert all(t == 0 and t.dtype == torch.int64 for t in counts)


# --- our own ---


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_saved_and_loaded_is_identical(options: dict, tmp_path: Path) -> None:
    model = UNet(2, 3, features=(3, 5, 9), **options)
    x = torch.randn(2, 2, 9, 13)
    model(x)  # running statistics that are not as made
    model.inc.double_conv[0].weight.data[0, 0, 0, :2] = torch.tensor([-0.0, float("nan")])
    model.save_pretrained(tmp_path / "a" / "model")
    assert sorted(p.name for p in (tmp_path / "a" / "model").iterdir()) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "a" / "model", str(tmp_path / "a" / "model" / "model.safetensors")):
        loaded = UNet.from_pretrained(path)
        assert_identical(loaded, model)
        assert not loaded.training
    assert all(p.is_contiguous() for p in loaded.parameters())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    # Without config.json, all but what weights cannot tell; in bilinear the last of features is milesial's.
    alone = UNet.from_pretrained(model.state_dict(), activation=options["activation"], head=options["head"])
    features = (3, 5, 10) if options["upsample"] == "bilinear" else (3, 5, 9)
    assert alone.config == {**model.config, "features": features}


@pytest.mark.parametrize("dtype", pretrained.DTYPES)
def test_dtype_is_kept_or_as_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    model = UNet(1, 2, features=(2, 4)).to(dtype)
    model.save_pretrained(tmp_path)
    assert_identical(UNet.from_pretrained(tmp_path), model)
    assert_identical(UNet.from_pretrained(tmp_path, dtype=torch.float64), model.double())


def test_a_subclass_loads_its_own_kind_and_leaves_source_and_random_state_alone() -> None:
    state = milesial().state_dict()
    before = {name: t.clone() for name, t in state.items()}
    random = torch.get_rng_state()
    model = type("Renamed", (UNet,), {}).from_pretrained(state)
    assert type(model).__name__ == "Renamed"
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()
    assert all(torch.equal(state[name], t) for name, t in before.items())


def test_a_subclass_of_other_arguments_saves_what_a_unet_loads(tmp_path: Path) -> None:
    class Mine(UNet):
        def __init__(self) -> None:
            super().__init__(1, 2, features=SMALL)

    model = Mine().eval()
    model.save_pretrained(tmp_path)
    assert_identical(UNet.from_pretrained(tmp_path), model)
    with pytest.raises(ConfigError, match="from_pretrained: expected Mine to take the arguments of UNet"):
        Mine.from_pretrained(tmp_path)


def test_a_runs_folder_loads_like_a_saved_model(tmp_path: Path) -> None:
    model = UNet(1, 2, features=SMALL, norm="instance", activation="leaky_relu", head="softmax").eval()
    model.save_pretrained(tmp_path)
    config = {"model": model.config, "data": {"channels": 1}, "training": {"tta": True}, "train": ["a"], "val": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_identical(UNet.from_pretrained(tmp_path), model)
    changes = {"head": None, "activation": "relu"}
    assert UNet.from_pretrained(tmp_path, **changes).config == model.config | changes


def test_saving_replaces_only_what_it_saved(tmp_path: Path) -> None:
    first, second = UNet(1, 1, features=(2, 4)), UNet(1, 2, features=SMALL, norm=None)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert_identical(UNet.from_pretrained(tmp_path), second)
    weights = (tmp_path / "model.safetensors").read_bytes()
    run = json.dumps({"model": first.config, "data": {}, "training": {}, "fastunet": "0"})
    for other in (run, '{"model_type": "bert"}', "[]", "{"):
        (tmp_path / "config.json").write_text(other)
        with pytest.raises(DataError, match=r"config.json: expected none, or one of save_pretrained.*got another kind"):
            first.save_pretrained(tmp_path)
        assert (tmp_path / "config.json").read_text() == other
        assert (tmp_path / "model.safetensors").read_bytes() == weights
    with pytest.raises(DataError, match="expected a folder, got a file"):
        first.save_pretrained(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()  # somebody else's weights
    with pytest.raises(DataError, match=r"model.safetensors: expected none, or one of save_pretrained.*another kind"):
        first.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_saved_weights_have_the_mode_of_other_files_and_a_checksum(tmp_path: Path) -> None:
    UNet(1, 1, features=(2, 4)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_mode == (tmp_path / "config.json").stat().st_mode
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model.safetensors: expected tensors of SHA-256 \w{64}, got \w{64}"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("fails", ["_save_file", "write_json"])
def test_a_save_that_fails_changes_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = UNet(1, 1, features=(2, 4))
    first.save_pretrained(tmp_path)

    def fail(path: Path, value: object) -> None:
        Path(path).write_bytes(b"half") if fails == "_save_file" else None
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, fails, fail)
    with pytest.raises(OSError, match="disk full"):
        UNet(1, 2, features=SMALL).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_identical(UNet.from_pretrained(tmp_path), first)


def test_a_changed_model_is_not_saved_as_what_it_was(tmp_path: Path) -> None:
    changes = {
        "eps": lambda m: setattr(m.inc.double_conv[1], "eps", 1e-3),
        "GELU": lambda m: m.inc.double_conv.__setitem__(2, nn.GELU()),
        "dilation": lambda m: setattr(m.inc.double_conv[3], "dilation", (2, 2)),
        "head": lambda m: setattr(m.outc, "head", "sigmoid"),
        "extra": lambda m: m.add_module("extra", nn.Identity()),
    }
    for name, change in changes.items():
        model = UNet(1, 1, features=(2, 4))
        change(model)
        with pytest.raises(ConfigError, match=f"save_pretrained: expected UNet as built.*{'0.001' * (name == 'eps')}"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    model = UNet(1, 1, features=(2, 4))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(UNet(1, 1, features=(2, 4)))
    synchronised.load_state_dict(model.state_dict())
    synchronised.save_pretrained(tmp_path / "model")
    assert_identical(UNet.from_pretrained(tmp_path / "model"), model)


def test_a_model_comes_back_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is a folder here, and what is asked of it is kept."""
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra train")
    asked: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
            asked.append({"token": self.token, "private": private, "exist_ok": exist_ok})
            return SimpleNamespace(repo_id=f"user/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    model = fastunet.UNet(1, 2, features=(2, 4), norm="instance").eval()
    assert model.push_to_hub("cells", private=True, token="t") == "https://hub/user/cells"
    assert asked == [{"token": "t", "private": True, "exist_ok": True}]
    again, image = fastunet.UNet.from_pretrained(tmp_path / "user/cells").eval(), torch.randn(1, 1, 9, 9)
    assert torch.equal(again(image), model(image))
