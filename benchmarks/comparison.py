"""Ours against the providers that can run here: a net's inference and training step, and its layers.

All that are compared take turns in one run, and the ratio is that of each round; what is not right, or does not run,
is named with its reason and has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import fastunet
from fastunet.checks import ConfigError
from fastunet.dispatch import selected_backend

from .cases import TASKS, Layer, Settings, unet_layers
from .harness.environment import environment
from .providers import OURS, Provider, Run, dtype_name, layer_providers, net_providers
from .results import Row, times_ms
from .runs import NetCheck, check_layer, device_inputs, input_sets, right_runs, time_in_turn

# Providers that compile for each layer anew, which takes longer than the layers.
_COMPILE_EACH_LAYER = ("compile", "compile max-autotune")
# Layers of every kind, from both ends of the net.
_FEW = ("inc.c1", "inc.c2", "down1.c1", "up1.up", "up1.c1", "outc")


def default_settings(device: str, dtype: torch.dtype, *, quick: bool = False, **given: Any) -> Settings:
    """What takes about three minutes on two CPU cores, or on a GPU; `quick`, half a minute. given: replaces parts."""
    chosen: dict[str, Any] = {"size": 256, "batch": 1, "features": (32, 64, 128, 256, 512)}
    chosen |= {"rounds": 15, "seconds": 15.0}
    if device == "cuda":
        chosen = {"size": 512, "batch": 16, "features": (64, 128, 256, 512, 1024), "rounds": 50, "seconds": 5.0}
    if quick:
        chosen |= {"rounds": 7, "seconds": 3.0, "warmup": 1, "compiles": False, "layers": _FEW}
        if device != "cuda":
            chosen |= {"size": 128, "features": (16, 32, 64, 128, 256)}
    return Settings(device, dtype_name(dtype), **(chosen | given))


def check_settings(settings: Settings) -> None:
    """ConfigError unless there is a net of those features, and its images reach its bottom."""
    if len(settings.features) < 2 or min(settings.features) < 1:
        raise ConfigError(f"features: expected two or more numbers from 1, got {settings.features}")
    least = 2 ** (len(settings.features) - 1)
    if settings.size < least or settings.batch < 1:
        raise ConfigError(f"expected size >= {least} and batch >= 1, got {settings.size} and {settings.batch}")
    if settings.batch == 1 and settings.size < 2 * least:
        raise ConfigError(
            f"size, batch: expected more than one value per channel at the bottom for batch norm in training, got one: "
            f"take a batch of 2, or images of {2 * least}"
        )


def compare(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """A row for each task of the net, then for each layer, as they come; progress gets what is being done."""
    check_settings(settings)
    torch.manual_seed(0)
    model = fastunet.UNet(settings.in_channels, settings.out_channels, features=settings.features)
    layers = unet_layers(model, settings.batch, settings.size, settings.size)
    model = model.to(settings.torch_device)
    flops = {
        "inference": sum(layer.flops for layer in layers),
        "training": sum(layer.flops + layer.backward_flops for layer in layers),
    }
    for task in TASKS:
        yield compare_net(settings, model, task, flops[task], progress)
    del model
    for layer in layers:
        if settings.layers is None or layer.name in settings.layers:
            progress(layer.name)
            yield compare_layer(settings, layer)


def compare_net(
    settings: Settings,
    model: fastunet.UNet,
    task: str,
    flops: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Row:
    """The row of "inference" or "training" of the model; flops: of one run."""
    device, training = settings.torch_device, task == "training"
    x = torch.randn(settings.batch, settings.in_channels, settings.size, settings.size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (settings.batch, settings.out_channels, settings.size, settings.size)
    target = torch.randint(0, 2, shape, device=device).float().contiguous(memory_format=torch.channels_last)
    gate = NetCheck(model, x, target, training=training)
    providers = net_providers(device, settings.torch_dtype, training=training, thorough=settings.thorough)

    def prepare(provider: Provider) -> list[Run]:
        progress(f"{task}: {provider.name}")
        return [provider.prepare(model, x, target if training else None)]

    row = {"kind": "net", "name": task, "flops": flops, "images": settings.batch}
    skip = {} if settings.compiles else {each.name: _NOT_ASKED for each in providers if each.name.startswith("compile")}
    return row | run_comparison(settings, providers, prepare, gate.check, skip)


_NOT_ASKED = "torch.compile was not asked for"


def compare_layer(settings: Settings, layer: Layer) -> Row:
    """The row of one layer's forward pass, on inputs that have left the cache."""
    device = settings.torch_device
    inputs = device_inputs(layer, device, settings.torch_dtype)
    sets = input_sets(inputs, device)
    providers = layer_providers(layer, device, settings.torch_dtype, thorough=settings.thorough)

    def prepare(provider: Provider) -> list[Run]:
        return [provider.prepare(each) for each in sets]

    def check(provider: Provider, result: Any) -> None:
        check_layer(layer, inputs, result, allow_tf32=device.type == "cuda")

    row = {"kind": "layer", "name": layer.name, "op": layer.op, "flops": layer.flops}
    row["shapes"] = {name: list(shape) for name, shape in layer.shapes.items()}
    skip = {} if settings.thorough else dict.fromkeys(_COMPILE_EACH_LAYER, "compiling each layer was not asked for")
    return row | run_comparison(settings, providers, prepare, check, skip)


def run_comparison(
    settings: Settings,
    providers: Sequence[Provider],
    prepare: Callable[[Provider], list[Run]],
    check: Callable[[Provider, Any], object],
    skip: Mapping[str, str],
) -> Row:
    """The row of a comparison, the first provider ours.

    "status" is "ok", or "parity failed", or "failed" where ours has no time; then nothing has.
    """
    ours, *others = providers
    runs, missing = right_runs([ours], prepare, check, skip)
    if not runs:
        status = "parity failed" if missing[OURS].startswith("parity failed") else "failed"
        return {"status": status, "missing": missing, "forms": _forms(providers)}
    found, missing = right_runs(others, prepare, check, skip)
    row: Row = {"status": "ok", "missing": missing, "forms": _forms(providers), **time_in_turn(settings, runs | found)}
    if "eager" in row["samples_ms"]:
        times = times_ms(row)["eager"]
        row["unsteady"] = times.p90 / times.p10 > STEADY
    return row


# The spread, p90 / p10, of the plainest provider's times, above which other work has disturbed the machine too much.
STEADY = 1.15


def _forms(providers: Sequence[Provider]) -> dict[str, Row]:
    return {each.name: {"layout": each.layout, "dtype": each.dtype} for each in providers}


def summarise(rows: Sequence[Row]) -> Row:
    """By task, each provider's ratio; of the layers, by provider, how many ours is faster in, and of how many.

    "unsteady": tasks whose figures count for nothing, since eager's own times vary too much.
    """
    summary: Row = {row["name"]: row["ratios"] for row in rows if row["kind"] == "net" and "ratios" in row}
    layers: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == "layer":
            for name, found in row.get("ratios", {}).items():
                counts = layers.setdefault(name, {"faster": 0, "compared": 0})
                counts["compared"] += 1
                counts["faster"] += found["ratio"] > 1
    unsteady = [row["name"] for row in rows if row.get("unsteady")]
    return summary | {
        "layers": layers,
        "not_measured": sum(row["status"] != "ok" for row in rows),
        "unsteady": unsteady,
    }


def report(settings: Settings, rows: Sequence[Row]) -> Row:
    """What the JSON file holds."""
    return {
        "summary": summarise(rows),
        "environment": environment(settings.device),
        "settings": {**asdict(settings), "threads": torch.get_num_threads(), "backend": selected_backend()},
        "rows": list(rows),
    }
