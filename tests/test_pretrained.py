"""UNet.from_pretrained and save_pretrained: other people's checkpoints, our own, and files that are broken or bad."""

from __future__ import annotations

import json
import os
import resource
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="needs the extra train")

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastunet
from fastunet import pretrained
from fastunet.checks import ConfigError, DataError, DtypeError, MissingPackageError

UNet = fastunet.UNet
SMALL = (4, 8, 16)


# --- models of the known formats, with random statistics ---


def two_convolutions(a: int, mid: int, b: int, bias: bool) -> nn.Sequential:
    first = (nn.Conv2d(a, mid, 3, padding=1, bias=bias), nn.BatchNorm2d(mid), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(mid, b, 3, padding=1, bias=bias), nn.BatchNorm2d(b), nn.ReLU())


class Held(nn.Module):
    """Modules as attributes, which is all that names depend on."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Milesial(nn.Module):
    """Names and joining order of milesial/Pytorch-UNet; `bias`: of convolutions before a norm, as it once had."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], *, bilinear: bool, bias: bool) -> None:
        super().__init__()
        self.depth = len(widths) - 1

        def block(a: int, mid: int, b: int) -> nn.Module:
            return Held(double_conv=two_convolutions(a, mid, b, bias))

        self.inc = block(channels, widths[0], widths[0])
        for i in range(self.depth):
            b = widths[i] if bilinear and i == self.depth - 1 else widths[i + 1]
            self.add_module(f"down{i + 1}", Held(maxpool_conv=nn.Sequential(nn.MaxPool2d(2), block(widths[i], b, b))))
        for i in range(self.depth):
            skip, low = widths[-2 - i], widths[-1 - i]
            if bilinear:
                up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                conv = block(2 * skip, skip, widths[max(self.depth - 2 - i, 0)])
            else:
                up, conv = nn.ConvTranspose2d(low, skip, 2, 2), block(2 * skip, skip, skip)
            self.add_module(f"up{i + 1}", Held(up=up, conv=conv))
        self.outc = Held(conv=nn.Conv2d(widths[0], classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc.double_conv(x)]
        for i in range(1, self.depth + 1):
            pool, block = self.get_submodule(f"down{i}").maxpool_conv
            skips.append(block.double_conv(pool(skips[-1])))
        x = skips.pop()
        for i in range(1, self.depth + 1):
            up = self.get_submodule(f"up{i}")
            x = up.conv.double_conv(torch.cat([skips.pop(), up.up(x)], dim=1))
        return self.outc.conv(x)


class BrainSegmentation(nn.Module):
    """Names and joining order, [up, skip], of mateuszbuda/brain-segmentation-pytorch."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()

        def block(a: int, b: int, name: str) -> nn.Module:
            names = [name + kind for kind in ("conv1", "norm1", "relu1", "conv2", "norm2", "relu2")]
            return Held(**dict(zip(names, two_convolutions(a, b, b, False), strict=True)))

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


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode and float64, no parameter or statistic as it was made, and outputs not all alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 3  # as made, each layer would halve what the image says
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


MILESIAL = [
    (3, 1, (6, 12, 24, 48, 96), False, False),
    (1, 4, (5, 10, 20), False, True),
    (3, 1, (6, 12, 24), True, True),
    (1, 4, (5, 10, 20, 40), True, False),
]


@pytest.mark.parametrize(("channels", "classes", "widths", "bilinear", "bias"), MILESIAL)
def test_milesials_outputs(
    channels: int, classes: int, widths: tuple[int, ...], bilinear: bool, bias: bool, tmp_path: Path
) -> None:
    source = randomised(Milesial(channels, classes, widths, bilinear=bilinear, bias=bias))
    file = tmp_path / "checkpoint_epoch5.pth"
    torch.save({**source.state_dict(), "mask_values": [0, 255]}, file)
    loaded = UNet.from_pretrained(file)
    assert not loaded.training
    assert loaded.config == {
        "in_channels": channels,
        "out_channels": classes,
        "features": widths,
        "norm": "batch",
        "upsample": "bilinear" if bilinear else "transpose",
        "activation": "relu",
        "head": None,
    }
    assert_equal_outputs(loaded, source, channels)
    # In training the batch's mean takes any bias off: the same outputs, and the same running variance after them.
    x = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(loaded.train()(x), source.train()(x), rtol=1e-8, atol=1e-8)
    index = "inc.double_conv.1.running_var"
    torch.testing.assert_close(loaded.state_dict()[index], source.state_dict()[index], rtol=1e-10, atol=0)


def test_the_bias_before_a_norm_matters() -> None:
    source = randomised(Milesial(1, 2, SMALL, bilinear=False, bias=True))
    without = {name: t for name, t in source.state_dict().items() if ".double_conv.0.bias" not in name}
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_outputs(UNet.from_pretrained(without), source, 1)


@pytest.mark.parametrize(("channels", "classes"), [(3, 1), (1, 4)])
def test_brain_segmentations_outputs(channels: int, classes: int, tmp_path: Path) -> None:
    source = randomised(BrainSegmentation(channels, classes, 8))
    torch.save(source.state_dict(), tmp_path / "unet.pt")
    loaded = UNet.from_pretrained(tmp_path / "unet.pt")
    assert loaded.config == {
        "in_channels": channels,
        "out_channels": classes,
        "features": (8, 16, 32, 64, 128),
        "norm": "batch",
        "upsample": "transpose",
        "activation": "relu",
        "head": "sigmoid",
    }
    assert_equal_outputs(loaded, source, channels)
    logits = UNet.from_pretrained(source.state_dict(), head=None)
    assert_equal_outputs(nn.Sequential(logits, nn.Sigmoid()), source, channels)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_the_joining_order_matters_at_every_level(level: int) -> None:
    source = randomised(BrainSegmentation(2, 2, 4))
    loaded = UNet.from_pretrained(source.state_dict())
    weight = loaded.get_submodule(f"up{level}").conv.double_conv[0].weight
    weight.data = weight.data.roll(weight.shape[1] // 2, dims=1)
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_outputs(loaded, source, 2)


def milesial() -> nn.Module:
    return randomised(Milesial(1, 2, SMALL, bilinear=False, bias=False))


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
    state = {**{prefix + name: t for name, t in source.state_dict().items()}, "mask_values": [0, 1]}
    torch.save(state if nest is None else {nest: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    assert_equal_outputs(UNet.from_pretrained(tmp_path / "c.pth"), source, 1)


@pytest.mark.parametrize("model", [milesial, lambda: randomised(BrainSegmentation(1, 1, 2))])
def test_missing_batch_counts_are_zero(model) -> None:
    source = model()
    state = {name: t for name, t in source.state_dict().items() if "num_batches_tracked" not in name}
    loaded = UNet.from_pretrained(state)
    assert_equal_outputs(loaded, source, 1)
    counts = [t for name, t in loaded.state_dict().items() if "num_batches_tracked" in name]
    assert counts
    assert all(t == 0 and t.dtype == torch.int64 for t in counts)
    assert UNet.from_pretrained(source.state_dict()).inc.double_conv[1].num_batches_tracked == 7


# --- our own ---


OWN = [
    dict(zip(("norm", "upsample", "activation", "head"), values, strict=True))
    for values in (
        ("batch", "transpose", "relu", None),
        ("batch", "bilinear", "leaky_relu", "sigmoid"),
        ("instance", "transpose", "leaky_relu", "softmax"),
        ("instance", "bilinear", "relu", None),
        (None, "transpose", "relu", "sigmoid"),
        (None, "bilinear", "leaky_relu", "softmax"),
    )
]


def bits(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_identical(loaded: UNet, model: UNet) -> None:
    assert loaded.config == model.config
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    for name, t in expected.items():
        assert actual[name].dtype == t.dtype, name
        assert actual[name].shape == t.shape, name
        assert torch.equal(bits(actual[name]), bits(t)), name


@pytest.mark.parametrize("options", OWN, ids=lambda o: "-".join(map(str, o.values())))
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


def test_loading_leaves_source_and_random_state_alone() -> None:
    state = milesial().state_dict()
    before = {name: t.clone() for name, t in state.items()}
    random = torch.get_rng_state()
    model = UNet.from_pretrained(state)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()
    assert all(torch.equal(state[name], t) for name, t in before.items())


class Renamed(UNet):
    """A subclass, as users have."""


def test_a_subclass_makes_its_own_kind() -> None:
    assert type(Renamed.from_pretrained(milesial().state_dict())) is Renamed


def test_a_runs_folder_loads_like_a_saved_model(tmp_path: Path) -> None:
    model = UNet(1, 2, features=SMALL, norm="instance", activation="leaky_relu", head="softmax").eval()
    model.save_pretrained(tmp_path)
    config = {"model": model.config, "data": {"channels": 1}, "training": {"tta": True}, "train": ["a"], "val": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_identical(UNet.from_pretrained(tmp_path), model)
    assert UNet.from_pretrained(tmp_path, head=None, activation="relu").config == {
        **model.config,
        "head": None,
        "activation": "relu",
    }


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


# --- what is refused ---


CONTRADICTIONS = {
    "in_channels": (3, "in_channels: expected 1, as the weights have it, got 3"),
    "out_channels": (5, "out_channels: expected 2, as the weights have it, got 5"),
    "features": ((4, 8), r"features: expected \(4, 8, 16\), as the weights have it, got \(4, 8\)"),
    "norm": (None, "norm: expected 'batch', as the weights have it, got None"),
    "upsample": ("bilinear", "upsample: expected 'transpose', as the weights have it, got 'bilinear'"),
    "head": ("tanh", "head: expected one of None, 'sigmoid', 'softmax', got 'tanh'"),
    "activation": ("gelu", "activation: expected one of 'relu', 'leaky_relu', got 'gelu'"),
    "widths": ((4, 8), "expected options among in_channels, .*, head, got 'widths'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_options_that_contradict_the_weights(name: str) -> None:
    value, message = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=message):
        UNet.from_pretrained(milesial().state_dict(), **{name: value})


def test_options_that_agree_are_welcome() -> None:
    model = UNet(1, 2, features=(4, 8, 11), upsample="bilinear", norm="instance", activation="leaky_relu")
    assert_identical(UNet.from_pretrained(model.state_dict(), **model.config), model)
    assert_identical(UNet.from_pretrained(model.state_dict(), **{**model.config, "features": [4, 8, 11]}), model)
    with pytest.raises(ConfigError, match=r"features: expected \(4, 8, 16\), .* got \(4, 7, 16\)"):
        UNet.from_pretrained(model.state_dict(), features=(4, 7, 16))


def without(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in milesial().state_dict().items() if key != name}


def changed(name: str, t: object) -> dict[str, object]:
    return {**milesial().state_dict(), name: t}


DOWN1 = "down1.maxpool_conv.1.double_conv"
BRAIN_WITHOUT_UP = {k: t for k, t in BrainSegmentation(1, 1, 2).state_dict().items() if "upconv4" not in k}
WRONG_STATES = {
    "unknown": (
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)).state_dict(),
        r"milesial/Pytorch-UNet.*/brain-segmentation-pytorch.*got 4 tensors: 0.weight, 0.bias, 1.weight, \.\.\.",
    ),
    "empty": ({}, "got 0 tensors: none"),
    "missing": (
        without("up1.up.bias"),
        r"the 66 tensors of UNet\(in_channels=1.* 1 missing: up1.up.bias; 0 unknown: none",
    ),
    "more": (changed("attention.weight", torch.ones(1)), "got 0 missing: none; 1 unknown: attention.weight"),
    "shape": (changed("up1.up.weight", torch.ones(16, 8, 3, 3)), r"up1.up.weight: .* \[16, 8, 2, 2\].*\[16, 8, 3, 3\]"),
    "rank": (changed("outc.conv.weight", torch.ones(4)), r"outc.conv.weight: expected a 4-D tensor, got \[4\]"),
    "without head": (without("outc.conv.weight"), "outc.conv.weight: expected a 4-D tensor, got none"),
    "without a level": (without(f"{DOWN1}.3.weight"), f"{DOWN1}.3.weight: expected a 4-D tensor, got none"),
    "bias of another size": (changed("inc.double_conv.0.bias", torch.ones(3)), "1 unknown: inc.double_conv.0.bias"),
    "object": (changed("epoch", 5), "expected a state dict of tensors, got int 'epoch'"),
    "number as name": ({0: torch.ones(1)}, "got Tensor 0"),
    "brain without up": (BRAIN_WITHOUT_UP, "2 missing: up1.up.weight, up1.up.bias; 0 unknown"),
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
        DtypeError, match=r"of one dtype, or from_pretrained\(dtype=\), got torch.float16, torch.float64"
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
            UNet.from_pretrained(milesial().state_dict(), dtype=dtype)


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
    torch.save({**milesial().state_dict(), "mask_values": Malicious(made)}, file)
    with pytest.raises(DataError, match=r"a file that it refuses: it holds \S*\.mkdir. Nothing of it was run") as error:
        UNet.from_pretrained(file)
    assert "weights_only=False" not in str(error.value)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "the file is not what this test is about"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(UNet(1, 1, features=(2, 4)), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"it holds fastunet.unet.UNet. .* save model.state_dict\(\)"):
        UNet.from_pretrained(tmp_path / "model.pt")


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
        "empty.safetensors": (b"", "expected a whole safetensors file"),
        "zip.safetensors": (zipped, "expected a whole safetensors file"),
        "tensors.pth": (tensors, "it is no pickle of tensors"),
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


@pytest.mark.parametrize("bomb", [expanded, compressed, headed])
def test_files_that_claim_more_than_they_hold_are_refused_at_once(bomb, tmp_path: Path) -> None:
    path, before = bomb(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"{path}: expected "):
        UNet.from_pretrained(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**13  # KiB: the compressed one holds 2**14


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    model = UNet(1, 2, features=(2, 4), head="sigmoid")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model": {**model.config, "features": [2, 4]}, "fastunet": fastunet.__version__}
    cases = {
        "{": "expected the config.json of a fastunet model or run, got JSONDecodeError",
        "[]": "expected the config.json of a fastunet model or run, got TypeError",
        '{"model": 3}': "expected the config.json of a fastunet model or run, got TypeError",
        '{"model_type": "bert"}': r"expected the config.json of a fastunet model or run, got KeyError\('model'\)",
        '{"model": {"dropout": 0.5}}': r"got KeyError\('dropout'\)",
        '{"model": {"norm": null}}': "norm: expected 'batch', as the weights have it, got None",
        '{"model": {"features": [2, 4, 8]}}': r"features: expected \(2, 4\), as the weights have it, got \(2, 4, 8\)",
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


def test_an_average_of_weights_loads(tmp_path: Path) -> None:
    """Of torch's AveragedModel, whose state dict counts what was averaged."""
    model = randomised(fastunet.UNet(1, 2, features=(4, 8)))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "ema.pth")
    for source in (tmp_path / "ema.pth", averaged.state_dict()):
        loaded = fastunet.UNet.from_pretrained(source)
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
