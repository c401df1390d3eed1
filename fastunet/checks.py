"""Named errors and the checks at the public boundary: each message gives what was expected and what came."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:  # the command line raises these errors before it needs torch
    from torch import Tensor


class FastUNetError(Exception):
    """Base of every error fastunet raises itself."""


class ShapeError(FastUNetError, ValueError):
    """A tensor has the wrong rank, channels or spatial size."""


class DtypeError(FastUNetError, TypeError):
    """Tensors are not floating point, or differ in dtype."""


class DeviceError(FastUNetError, ValueError):
    """Tensors of one call live on different devices."""


class BackendError(FastUNetError, RuntimeError):
    """The implementation asked for cannot run here."""


class DataError(FastUNetError, ValueError):
    """A file or folder is not usable: the message names it, with expected and actual."""


class ConfigError(FastUNetError, ValueError):
    """Options contradict each other or lie outside their range."""


class Interrupted(FastUNetError):
    """Training was stopped by a signal, after its state was saved."""


class MissingPackageError(FastUNetError, ModuleNotFoundError):
    """A package of one of fastunet's extras is not installed: the message names both."""


def required(message: str, package: str) -> Any:
    """Import a package, of an extra, and return it; raise MissingPackageError with the message where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(message, name=package) from error


def check_types(settings: Any) -> None:
    """Raise TypeError on the first field of a dataclass whose value, from a file, is not what its annotation says."""
    for name, hint in get_type_hints(type(settings)).items():
        if not _is_a(value := getattr(settings, name), hint):
            raise TypeError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _is_a(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type; a whole number is a float too, and True is no number."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return any(_is_a(value, part) for part in parts)
    if kind is float:
        return type(value) in (int, float)
    if hint is not Any and type(value) is not kind:
        return False
    if kind is tuple and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(_is_a, value, parts))
    return kind not in (tuple, list) or all(_is_a(each, parts[0]) for each in value)


def check_activation(op: str, *, dims: int = 2, **tensors: Tensor) -> None:
    """Raise unless each tensor is a floating-point batch of images [N, C, H, W], with dims=3 of volumes [N, C, D, H,
    W].
    """
    shape = "[N, C, H, W]" if dims == 2 else "[N, C, D, H, W]"
    for name, t in tensors.items():
        if t.dim() != dims + 2:
            raise ShapeError(f"{op}: {name}: expected a {dims + 2}-D tensor {shape}, got {list(t.shape)}")
        if not t.is_floating_point():
            raise DtypeError(f"{op}: {name}: expected a floating-point tensor, got {t.dtype}")


def check_shape(op: str, name: str, t: Tensor | None, expected: Sequence[int]) -> None:
    """Raise unless t, where given, has exactly the expected shape."""
    if t is not None and tuple(t.shape) != tuple(expected):
        raise ShapeError(f"{op}: {name}: expected shape {list(expected)}, got {list(t.shape)}")


def check_convolution(op: str, weight: Tensor, channels: int, kernel: int, *, transposed: bool = False) -> int:
    """Raise unless weight is [out, channels, kernel, kernel] ([channels, out, ...] if transposed); return the number of
    output channels.
    """
    if weight.dim() != 4:
        raise ShapeError(f"{op}: weight: expected a 4-D tensor, got {list(weight.shape)}")
    out_channels = weight.shape[1 if transposed else 0]
    first_two = (channels, out_channels) if transposed else (out_channels, channels)
    check_shape(op, "weight", weight, (*first_two, kernel, kernel))
    return out_channels


def check_pooled(op: str, height: int, width: int) -> None:
    """Raise unless a 2x2 window fits into the image."""
    if height < 2 or width < 2:
        raise ShapeError(f"{op}: expected height and width >= 2 for 2x2 pooling, got {height}x{width}")


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise unless the tensors live on x's device."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise DeviceError(f"{op}: {name}: expected device {x.device} (the input's), got {t.device}")


def check_together(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise unless the tensors live on x's device and, outside autocast, which casts them, share x's dtype."""
    check_device(op, x, **others)
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype and not autocasts(x.device.type):
            raise DtypeError(f"{op}: {name}: expected dtype {x.dtype} (the input's), got {t.dtype}")


def autocasts(device: str) -> bool:
    """Return whether autocast is on for that kind of device."""
    import torch

    # torch asks for a device that has autocast, and up to 2.11 torch.compile breaks its graph at is_autocast_available.
    return device != "meta" and torch.is_autocast_enabled(device)


def check_same_images(op: str, skip: Tensor, up: Tensor) -> None:
    """Raise unless skip and up agree in everything but their channels."""
    check_activation(op, skip=skip, up=up)
    check_shape(op, "up", up, (skip.shape[0], up.shape[1], *skip.shape[2:]))
    check_together(op, skip, up=up)


def check_images(name: str, t: Tensor) -> None:
    """Raise unless t is a floating-point batch [N, C, *spatial]."""
    if not t.is_floating_point():
        raise DtypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
    if t.dim() < 3:
        raise ShapeError(f"{name}: expected shape [N, C, *spatial], got {tuple(t.shape)}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return value, which is one of those allowed; raise for any other."""
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def check_weights(name: str, weights: Sequence[float] | float | Tensor | None) -> Tensor | None:
    """Return the weights, none negative, as a float tensor of dim 0 (one for all) or 1 (one each)."""
    if weights is None:
        return None
    import torch

    tensor = torch.as_tensor(weights)
    tensor = tensor if tensor.is_floating_point() else tensor.float()
    if tensor.dim() > 1 or bool((tensor < 0).any()):
        raise ConfigError(f"{name}: expected one number >= 0 or a list of them, got {weights}")
    return tensor


def some_of(values: Iterable[object]) -> str:
    """Return the first five for an error, and how many more there are."""
    texts = [str(value) for value in values]
    return (", ".join(texts[:5]) or "none") + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
