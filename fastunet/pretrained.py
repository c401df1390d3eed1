"""Weights from files: which U-Net they are of, under fastunet's names.

`load` turns a path or a state dict into the arguments of `fastunet.UNet` and its state dict; `save` leaves a folder
that `load` reads. Two sets of names are known: milesial/Pytorch-UNet's, which are ours, and mateuszbuda/
brain-segmentation-pytorch's. Channels, depth, norm and upsampling follow from names and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .checks import ConfigError, DataError, DtypeError, FastUNetError, required, some_of
from .files import write_json, written_whole
from .reference import ReferenceUNet
from .reference.unet import LAYERS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
STRUCTURE = ("in_channels", "out_channels", "features", "norm", "upsample", "dims")  # what weights tell
FREE = ("activation", "head")  # what they do not
NESTS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put it among other things
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, a LightningModule's attribute
# The grey values of the classes, which milesial's train.py adds, and the count of torch's AveragedModel.
NO_WEIGHTS = ("mask_values", "n_averaged")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OURS, BRAIN = "inc.double_conv.0.weight", "encoder1.enc1conv1.weight"  # by which the two are recognised
DIGEST, NO_DIGEST = "sha256", 64 * "0"


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], options: Mapping[str, Any], dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `fastunet.UNet` and its state dict, complete and of one dtype.

    `UNet.from_pretrained` says what source, options and dtype are, and which errors are raised. The tensors may share
    memory with those of source.
    """
    known = (*STRUCTURE, *FREE)
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"from_pretrained: expected options among {', '.join(known)}, got {unknown[0]!r}")
    weights, saved, where = _read(source)
    found, state = recognise(weights, where)
    config = _agreed(found, saved, DataError, f"{CONFIG} beside {where}")
    config = _agreed(config, options, ConfigError, "from_pretrained")
    check_fits(config, state, where)
    return config, _in_one_dtype(state, dtype, where)


def save(folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write FOLDER/config.json and FOLDER/model.safetensors; `UNet.save_pretrained` says when it refuses."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: expected a folder, got a file")
    for name in (CONFIG, WEIGHTS):
        if os.path.lexists(folder / name) and not _is_ours(folder / CONFIG):
            raise DataError(f"{folder / name}: expected none, or one of save_pretrained to replace, got another kind")
    check_fits(config, state, "save_pretrained")
    _in_one_dtype(state, None, "save_pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / WEIGHTS) as temporary:
        _save_file(temporary, state)
        # Both are complete before the first appears: one rename follows the other.
        write_json(folder / CONFIG, {"model": config, "fastunet": __version__})


def push(save_to: Callable[[Path], None], repo_id: str, private: bool, token: str | None) -> str:
    """Upload the folder that `save_to` writes; `UNet.push_to_hub` says more."""
    text = "push_to_hub: expected huggingface_hub, got none: pip install huggingface_hub"
    hub = required(text, "huggingface_hub")
    with tempfile.TemporaryDirectory() as folder:
        save_to(Path(folder))
        api = hub.HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        text = "Upload a fastunet.UNet"
        return str(api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=text))


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as a safetensors file, whole or not at all."""
    with written_whole(path) as temporary:
        _save_file(temporary, state)


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return what is in a .safetensors file, or in any other by torch.load(weights_only=True): no pickle is ever run.

    Raises DataError where the file is missing, broken or holds other objects, MissingPackageError without safetensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file of weights, or a folder with {WEIGHTS}, got no such file")
    if path.suffix == ".safetensors":
        package = _safetensors()
        content = path.read_bytes()  # the package's own reader wants names in UTF-8
        try:
            weights = package.torch.load(content)
        except package.SafetensorError as error:
            raise DataError(f"{path}: expected a whole safetensors file, got {error}") from error
        _check_digest(path, content)
        return weights
    return _torch_load(path)


def recognise(weights: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `fastunet.UNet` that names and shapes tell, and the tensors under its names.

    `where` is what errors call the weights. Raises DataError where they are no U-Net's that is known.
    """
    tensors = _tensors(weights, where)
    if OURS in tensors:
        head, state = None, tensors
    elif BRAIN in tensors:
        head, state = "sigmoid", _from_brain_segmentation(tensors)
    else:
        raise DataError(
            f"{where}: expected the weights of fastunet or milesial/Pytorch-UNet (with {OURS}) or of mateuszbuda/"
            f"brain-segmentation-pytorch (with {BRAIN}), got {len(tensors)} tensors: {some_of(tensors)}"
        )
    state = _with_statistics_as_ours(state)
    return {**_structure(state, where), "activation": "relu", "head": head}, state


def check_fits(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Raise ConfigError or DataError unless the tensors are those of UNet(**config) by name and shape."""
    try:
        with torch.device("meta"):
            expected = ReferenceUNet(**config).state_dict()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    missing, extra = ([name for name in a if name not in b] for a, b in ((expected, state), (state, expected)))
    if missing or extra:
        raise DataError(
            f"{where}: expected the {len(expected)} tensors of UNet({_arguments(config)}), got {len(missing)} missing: "
            f"{some_of(missing)}; {len(extra)} unknown: {some_of(extra)}"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise DataError(
                f"{where}: {name}: expected {list(tensor.shape)}, as in UNet({_arguments(config)}), "
                f"got {list(state[name].shape)}"
            )


# --- files ---


def _read(source: Any) -> tuple[Mapping[str, Any], dict[str, Any], str]:
    """Return the weights, the arguments of UNet in a config.json beside them, and what to call them in errors."""
    if isinstance(source, Mapping):
        return source, {}, "state dict"
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"from_pretrained: expected a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    weights = path / WEIGHTS if path.is_dir() else path
    config = weights.with_name(CONFIG)
    saved = _read_config(config) if weights.name == WEIGHTS and config.is_file() else {}
    content = read_weights(weights)
    # Tensors may be expanded from few values by strides of 0.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content, str(weights)).values())
    held = weights.stat().st_size
    if claimed > 2 * held + 2**20:
        raise DataError(f"{weights}: expected tensors within the {held} bytes of the file, got some of {claimed} bytes")
    return content, saved, str(weights)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the arguments of UNet in the config.json of a training run or of `save`."""
    try:
        saved = json.loads(path.read_text())["model"]
        if unknown := [name for name in saved if name not in (*STRUCTURE, *FREE)]:
            raise KeyError(unknown[0])
        return dict(saved)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected the config.json of a fastunet model or run, got {error!r}") from error


def _is_ours(config: Path) -> bool:
    """Whether `save` wrote it: a training run's says more, which would be lost."""
    try:
        return json.loads(config.read_text()).keys() == {"model", "fastunet"}
    except (OSError, ValueError, AttributeError):
        return False


def _torch_load(path: Path) -> Mapping[str, Any]:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {named[1]}" if named else "it is no pickle of tensors"
        # torch's own message advises to run the pickle.
        raise DataError(
            f"{path}: expected tensors alone, which torch.load(weights_only=True) reads, got a file that it refuses: "
            f"{reason}. Nothing of it was run; have its author save model.state_dict()"
        ) from error
    except Exception as error:  # a broken file fails wherever the reading of zip and pickle happens to stumble
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: expected a whole file of torch.save, got {type(error).__name__}: {reason}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a state dict, got {type(content).__name__}")
    return content


def _check_archive(path: Path) -> None:
    """Raise DataError on a zip archive whose entries unpack to more than the file: torch.save does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError):  # torch.load says what is wrong, or knows an older format
        return
    if unpacked > (held := path.stat().st_size):
        raise DataError(f"{path}: expected tensors as torch.save leaves them, got {held} bytes that hold {unpacked}")


def _save_file(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose metadata have the SHA-256 of what comes after the header."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    content = bytearray(_safetensors().torch.save(tensors, {DIGEST: NO_DIGEST}))
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(memoryview(content)[start:]).hexdigest()
    content[:start] = content[:start].replace(NO_DIGEST.encode(), digest.encode(), 1)
    # Not the package's own writer, whose files nobody else may read.
    path.write_bytes(content)


def _check_digest(path: Path, content: bytes) -> None:
    """Raise DataError where the tensors of a safetensors file, already found well-formed, are not those written."""
    start = 8 + int.from_bytes(content[:8], "little")
    written = json.loads(content[8:start]).get("__metadata__", {}).get(DIGEST)
    if written is not None and (found := hashlib.sha256(memoryview(content)[start:]).hexdigest()) != written:
        raise DataError(f"{path}: expected tensors of SHA-256 {written}, got {found}: the file is damaged")


def _safetensors() -> Any:
    """Return the package, which only reading and writing its files needs."""
    required(f"{WEIGHTS} needs safetensors: pip install 'fastunet[train]'", "safetensors.torch")
    import safetensors

    return safetensors


# --- names ---


def _tensors(weights: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the state dict within a checkpoint, without what wrappers put before its names."""
    nested = (weights[name] for name in NESTS if isinstance(weights.get(name), Mapping))
    entries = {name: value for name, value in next(nested, weights).items() if name not in NO_WEIGHTS}
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{where}: expected a state dict of tensors, got {type(value).__name__} {name!r}")
    while entries and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in entries)), None)):
        entries = {name.removeprefix(wrapper): value for name, value in entries.items()}
    return entries


_BRAIN_BLOCK = re.compile(r"(?:(encoder|decoder)(\d+)\.(?:enc|dec)\2|bottleneck\.bottleneck)(conv|norm)([12])\.(\w+)")
_BRAIN_UP = re.compile(r"upconv(\d+)\.(\w+)")


def _from_brain_segmentation(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its names as ours. It joins [up, skip] where we join [skip, up]: the weights' input channels change places."""
    depth = sum(re.fullmatch(r"encoder\d+\.enc\d+conv1\.weight", name) is not None for name in tensors)

    def renamed(name: str) -> str:
        if match := _BRAIN_BLOCK.fullmatch(name):
            side, level, kind, which, field = match.groups()
            index = 3 * (int(which) - 1) + (kind == "norm")
            if side == "decoder":
                block = f"up{depth + 1 - int(level)}.conv"
            elif side == "encoder" and level == "1":
                block = "inc"
            else:
                block = f"down{int(level) - 1 if level else depth}.maxpool_conv.1"
            return f"{block}.double_conv.{index}.{field}"
        if match := _BRAIN_UP.fullmatch(name):
            return f"up{depth + 1 - int(match[1])}.up.{match[2]}"
        return f"outc.{name}" if name.startswith("conv.") else name

    state = {renamed(name): tensor for name, tensor in tensors.items()}
    for level in range(1, depth + 1):
        joined, up = f"up{level}.conv.double_conv.0.weight", state.get(f"up{level}.up.weight")
        if up is not None and joined in state and up.dim() == state[joined].dim() > 1:
            state[joined] = state[joined].roll(-up.shape[1], dims=1)
    return state


_CONV_BIAS = re.compile(r"(.+\.double_conv)\.([03])\.bias")


def _with_statistics_as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what older code leaves out of, or adds to, a norm.

    torch before 0.4.1 did not count batches. milesial's convolutions once had a bias before the norm, which takes it
    off again with the mean: the running mean without it gives the same.
    """
    result = dict(state)
    for name, tensor in state.items():
        if name.endswith(".running_mean"):
            result.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
        if match := _CONV_BIAS.fullmatch(name):
            norm = f"{match[1]}.{int(match[2]) + 1}"
            mean = state.get(f"{norm}.running_mean")
            if f"{norm}.weight" in state and (mean is None or mean.shape == tensor.shape):
                del result[name]
                if mean is not None:
                    result[f"{norm}.running_mean"] = (mean - tensor).to(mean.dtype)
    return result


def _structure(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Return the arguments of UNet that the weights tell."""

    # A convolution's weight is [out, in, *kernel], whose kernel has as many sides as the image.
    dims = 3 if state[OURS].dim() == 5 else 2

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].dim() != dims + 2:
            got = list(state[name].shape) if name in state else "none"
            raise DataError(f"{where}: {name}: expected a {dims + 2}-D tensor, got {got}")
        return state[name].shape[axis]

    def level(index: int) -> str:
        return f"down{index}.maxpool_conv.1.double_conv.3.weight"

    features = [size("inc.double_conv.3.weight", 0), size(level(1), 0)]
    while level(len(features)) in state:
        features.append(size(level(len(features)), 0))
    transposed = any(name.endswith(".up.weight") for name in state)
    if not transposed:
        features[-1] = 2 * features[-2]  # milesial's; no weight depends on it
    batch, affine = ("inc.double_conv.1.running_mean" in state), ("inc.double_conv.1.weight" in state)
    return {
        "in_channels": size(OURS, 1),
        "out_channels": size("outc.conv.weight", 0),
        "features": tuple(features),
        "norm": "batch" if batch else "instance" if affine else None,
        "upsample": "transpose" if transposed else LAYERS[dims].interpolation,
        "dims": dims,
    }


# --- agreement ---


def _agreed(found: dict[str, Any], given: Mapping[str, Any], error: type[FastUNetError], place: str) -> dict[str, Any]:
    """Return what was found, overridden by what is given. Raises `error` where the weights contradict."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    same = dict(found)
    if found["upsample"] != "transpose" and isinstance(values.get("features"), tuple):
        same["features"] = (*found["features"][:-1], *values["features"][-1:])  # No weight depends on the last.
    for name in STRUCTURE:
        if name in values and values[name] != same[name]:
            raise error(f"{place}: {name}: expected {found[name]!r}, as the weights have it, got {values[name]!r}")
    return found | values


def _in_one_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None, where: str) -> dict[str, Tensor]:
    """Return the weights in `dtype`, or as they are where None, if they are of one."""
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    found = {tensor.dtype for name, tensor in state.items() if name not in counts}
    dtypes = found if dtype is None else {dtype}
    for kind in found | dtypes:
        if kind not in DTYPES:
            raise DtypeError(f"{where}: expected weights in {', '.join(map(str, DTYPES))}, got {kind}")
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise DtypeError(f"{where}: expected weights of one dtype, or from_pretrained(dtype=), got {names}")
    (kind,) = dtypes
    return {name: tensor.to(torch.int64 if name in counts else kind) for name, tensor in state.items()}


def _arguments(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.items())
