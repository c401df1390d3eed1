"""Bytes, counted without a GPU: what a training step keeps of its activations, and what the kernels move.

    python -m benchmarks memory kept [--norm batch] [--features 64 128 ...] [--size 512] [--out JSON]

prints, for every size of image inside the net, the bytes that an image of the batch takes until its backward: in plain
PyTorch, and in fastunet on ATen and on its Triton kernels. The nets run on tensors without data.

    python -m benchmarks memory moved [--capability 90 80] [--batch 16] [--features 64 128 ...] [--out JSON]

prints for every layer of a forward pass the bytes of its floor (cases.py), those that our kernel and its launcher move
to and from memory, those of an eager net in which every op is a pass of its own, and what the kernel loads from L2 for
every FLOP; for each GPU by its compute capability, with the configuration that is chosen there. access_counts.py says
what the counts assume.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastunet
from fastunet.files import write_json
from fastunet.reference import ReferenceUNet

from .access_counts import Traffic, copies_of, traffic_of
from .cases import DTYPE, DTYPES, Layer, Settings, eager_passes, fused_pass
from .harness.environment import environment
from .jobs import TARGETS, describe
from .results import markdown
from .search import step_up_cases

# Whose totals are the net's with its head in the last convolution's epilogue, as it runs without gradients.
JOINED = "with the head joined"
# The same, and every upsampling composed with the convolution after it.
COMPOSED = "with steps up composed, too"


@dataclass(frozen=True)
class LayerTraffic:
    """One layer: its FLOPs, the bytes it cannot do without, those of eager, and what our launch moves.

    launch: bytes of the kernel; copies: of the copies of weights that its launcher makes. form: how it reads its
    operands. config: its blocks, warps and stages.
    """

    name: str
    form: str
    config: str
    flops: int
    floor_bytes: int
    eager_bytes: int
    launch: Traffic
    copies: Traffic

    @property
    def memory_bytes(self) -> int:
        """To and from memory in all."""
        return self.launch.memory + self.copies.memory

    @property
    def l2_bytes_per_flop(self) -> float:
        """What the kernel loads from L2, by its products' FLOPs."""
        return self.launch.loaded / self.flops


def layer_traffic(layer: Layer, target: gpu.Target, dtype: torch.dtype = DTYPE) -> LayerTraffic:
    """Of a layer of transposed-convolution nets, on channels_last tensors of dtype. ValueError for any other op."""
    tensors = {name: _tensor(shape, dtype) for name, shape in {**layer.shapes, **layer.outputs}.items()}
    launch = _launch(layer, tensors, target)
    return _of_launch(layer, launch, tensors, dtype)


def joined_head_traffic(
    conv: Layer, head: Layer, target: gpu.Target, dtype: torch.dtype = DTYPE
) -> LayerTraffic | None:
    """Of a convolution with the head after it in its epilogue; None where the kernel cannot hold both."""
    from fastunet.kernels.conv3x3 import pointer
    from fastunet.kernels.epilogue import HEAD_CLASSES, Epilogue, Head

    tensors = {name: _tensor(shape, dtype) for name, shape in conv.shapes.items()}
    of_head = {f"head {name}": _tensor(shape, dtype) for name, shape in (head.parameters | head.outputs).items()}
    x, weight = tensors["x"], tensors["weight"]
    chosen = config.with_head(pointer.choose(x, None, weight, target, allow_tf32=False))
    if chosen.block_n < weight.shape[0] or head.shapes["weight"][0] > HEAD_CLASSES:
        return None
    epilogue = Epilogue(
        None,
        tensors["bias"],
        negative_slope=0.0,
        head=Head(of_head["head weight"], of_head["head bias"], sigmoid=False),
        probabilities=of_head["head y"],
    )
    launch = pointer.conv3x3_launch(x, None, weight, chosen, epilogue, allow_tf32=False)
    # The pair has no fewer bytes than its inputs, its parameters and the head's output.
    pair = replace(conv, name=f"{conv.name}+{head.name}", flops=conv.flops + head.flops)
    row = _of_launch(pair, launch, tensors | of_head, dtype)
    least = sum(t.numel() * t.element_size() for t in (tensors | of_head).values())
    eager = sum(work.bytes for layer in (conv, head) for work in eager_passes(layer, dtype.itemsize))
    return replace(row, floor_bytes=least, eager_bytes=eager)


def composed_traffic(settings: Settings, target: gpu.Target, dtype: torch.dtype = DTYPE) -> list[LayerTraffic]:
    """Of each upsampling with the convolution after it in one launch; none where the kernel does not take them all."""
    layers = {layer.name: layer for layer in settings.net_layers()}
    rows = []
    for name, case in step_up_cases([*layers.values()]).items():
        row = _composed(layers[name.replace(".c1", ".up")], layers[name], case.shapes, target, dtype)
        if row is None:
            return []
        rows.append(row)
    return rows


def _composed(
    up: Layer, conv: Layer, shapes: Mapping[str, tuple[int, ...]], target: gpu.Target, dtype: torch.dtype
) -> LayerTraffic | None:
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels
    from fastunet.kernels.epilogue import Epilogue

    skip, low, bias = (_tensor(shapes[name], dtype) for name in ("skip", "low", "bias"))
    (batch, c1, *sides), c_low, c_out = skip.shape, low.shape[1], shapes["weight"][0]
    if not config.fits_descriptors(dtype, target, (c1, c_low), (c_out,)):
        return None
    of_skip, of_low = _tensor((c_out, 9 * c1), dtype), _tensor((4 * c_out, 4 * c_low), dtype)
    border = torch.empty((4, 3, 3, c_out), device="meta")
    weights = kernels.Composed(of_skip, of_low, border)
    y = _tensor((batch, c_out, *sides), dtype)
    shape = config.ConvShape(c1, c_low, c_out, *low.shape[2:])
    chosen = config.composed_config(shape, dtype, target)
    launch = kernels.launch(skip, low, weights, chosen, Epilogue(y, bias, negative_slope=0.0))
    flops = 2 * y.numel() * (9 * c1 + 4 * c_low)
    # The pair has no fewer bytes than its inputs, its parameters and its output; the weights are composed once.
    of_border = border[:, : 2 + sides[0] % 2, : 2 + sides[1] % 2]
    given = [skip, low, bias, y, of_skip, of_low, of_border]
    pair = replace(conv, name=f"{up.name}+{conv.name}", flops=flops)
    row = _of_launch(pair, launch, {str(i): t for i, t in enumerate(given)}, dtype)
    eager = sum(work.bytes for layer in (up, conv) for work in eager_passes(layer, dtype.itemsize))
    return replace(row, floor_bytes=sum(t.numel() * t.element_size() for t in given), eager_bytes=eager)


def _of_launch(layer: Layer, launch: gpu.Launch, tensors: dict[str, Tensor], dtype: torch.dtype) -> LayerTraffic:
    arguments = launch.arguments
    form = config.DESCRIPTOR if {"x_desc", "low_desc"} & {*arguments} else config.POINTER
    return LayerTraffic(
        layer.name,
        config.FOLDED if arguments.get("FOLDED") else form,
        describe(launch),
        layer.flops,
        fused_pass(layer, dtype.itemsize).bytes,
        sum(work.bytes for work in eager_passes(layer, dtype.itemsize)),
        traffic_of(launch),
        copies_of(launch, tensors.values()),
    )


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Without memory, channels_last where it is an image or a weight."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _launch(layer: Layer, tensors: dict[str, Tensor], target: gpu.Target) -> gpu.Launch:
    """What the layer's op launches."""
    from fastunet.kernels import conv1x1, conv_transpose2x2
    from fastunet.kernels.conv3x3 import pointer
    from fastunet.kernels.epilogue import Epilogue

    x, weight, bias, y = tensors.get("x"), tensors.get("weight"), tensors.get("bias"), tensors["y"]
    options: dict[str, Any] = {"allow_tf32": False, "target": target}
    if layer.op == "conv_transpose2x2":
        return conv_transpose2x2.conv_transpose2x2_launch(x, weight, bias, y, **options)
    if layer.op == "conv1x1":
        return conv1x1.conv1x1_launch(x, weight, bias, y, activation=None, **options)
    if "conv3x3" not in layer.op:
        raise ValueError(f"expected an op of fastunet's kernels, got {layer.op!r}")
    first, up = tensors.get("skip", x), tensors.get("up")
    chosen = pointer.choose(first, up, weight, **options)
    epilogue = Epilogue(y, bias, negative_slope=0.0, pooled=tensors.get("pooled"))
    return pointer.conv3x3_launch(first, up, weight, chosen, epilogue, allow_tf32=False)


def net_traffic(
    settings: Settings, target: gpu.Target, dtype: torch.dtype = DTYPE
) -> tuple[list[LayerTraffic], LayerTraffic | None]:
    """Of each layer, and of the last two in one launch where they fit."""
    layers = settings.net_layers()
    joined = joined_head_traffic(layers[-2], layers[-1], target, dtype)
    return [layer_traffic(layer, target, dtype) for layer in layers], joined


def summarise(
    rows: Sequence[LayerTraffic], joined: LayerTraffic | None, composed: Sequence[LayerTraffic] = ()
) -> dict[str, Any]:
    """Totals of the net, layer by layer and, where that is possible, with the head joined to the last convolution, and
    with steps up composed beside.
    """
    summary = {"layer by layer": _totals(rows)}
    if joined is not None:
        summary[JOINED] = _totals([*rows[:-2], joined])
        replaced = {name for row in composed for name in row.name.split("+")}
        if composed:
            summary[COMPOSED] = _totals([*(r for r in rows[:-2] if r.name not in replaced), *composed, joined])
    return summary


def _totals(rows: Sequence[LayerTraffic]) -> dict[str, Any]:
    floor, memory, eager = (
        sum(getattr(row, name) for row in rows) for name in ("floor_bytes", "memory_bytes", "eager_bytes")
    )
    return {
        "floor_bytes": floor,
        "memory_bytes": memory,
        "eager_bytes": eager,
        "of_floor": memory / floor,
        "of_eager": memory / eager,
        "l2_bytes_per_flop": sum(row.launch.loaded for row in rows) / sum(row.flops for row in rows),
    }


def render(rows: Sequence[LayerTraffic], joined: LayerTraffic | None, composed: Sequence[LayerTraffic] = ()) -> str:
    """Markdown, in megabytes over the batch."""
    header = ["layer", "form", "config", "floor MB", "kernel MB", "eager MB", "of floor", "of eager", "L2 B/kFLOP"]
    every = [*rows, *([joined] if joined else []), *composed]
    lines = [_line(row.name, row.form, row.config, _totals([row])) for row in every]
    lines += [_line(name, "", "", totals) for name, totals in summarise(rows, joined, composed).items()]
    return markdown(header, lines)


def _line(name: str, form: str, config: str, totals: dict[str, Any]) -> list[str]:
    megabytes = [f"{totals[f'{what}_bytes'] / 1e6:.1f}" for what in ("floor", "memory", "eager")]
    shares = [f"{totals['of_floor']:.3f}", f"{totals['of_eager']:.3f}", f"{1e3 * totals['l2_bytes_per_flop']:.2f}"]
    return [name, form, config, *megabytes, *shares]


# --- what a step keeps ---

IMPLEMENTATIONS = ("eager", "aten", "triton")


def kept_bytes(settings: Settings, implementation: str) -> dict[int, int]:
    """Bytes that one image takes from forward to backward, by the height of the tensors.

    What does not depend on the number of images, such as the statistics of a batch, is left out.
    """
    one, two = (_kept(settings, implementation, batch) for batch in (1, 2))
    return {height: two[height] - one[height] for height in sorted(two, reverse=True) if two[height] > one[height]}


def _kept(settings: Settings, implementation: str, batch: int) -> Counter[int]:
    dtype = settings.torch_dtype
    kind = ReferenceUNet if implementation == "eager" else fastunet.UNet
    with torch.device("meta"):
        model: nn.Module = kind(
            settings.in_channels, settings.out_channels, features=settings.features, norm=settings.norm
        )
    model = model.to(dtype=dtype, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.empty(batch, settings.in_channels, settings.size, settings.size, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # One tensor of each storage, which stays alive so that no other takes its place.

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in held:
            found[t.untyped_storage()._cdata] = t
        return t

    with fastunet.backend("triton" if implementation == "triton" else "aten"), saved_tensors_hooks(keep, _as_is):
        y = model(x)
    assert y.requires_grad
    kept: Counter[int] = Counter()
    for t in found.values():
        kept[t.shape[2] if t.dim() == 4 else 0] += t.untyped_storage().nbytes()
    return kept


def _as_is(t: Tensor) -> Tensor:
    return t


def counted(settings: Settings) -> dict[str, Any]:
    """By implementation the bytes of each height; and in all, beside those of eager."""
    by_height = {name: kept_bytes(settings, name) for name in IMPLEMENTATIONS}
    totals = {name: sum(of.values()) for name, of in by_height.items()}
    return {
        "summary": {name: {"bytes": total, "of_eager": total / totals["eager"]} for name, total in totals.items()},
        "by_height": by_height,
    }


def kept_table(result: dict[str, Any], settings: Settings) -> str:
    """Write Markdown, in MB of 10^6 bytes."""
    by_height, summary = result["by_height"], result["summary"]
    rows = [
        [
            f"{height}x{height}" if height else "statistics",
            *(f"{by_height[name].get(height, 0) / 1e6:.1f}" for name in IMPLEMENTATIONS),
        ]
        for height in by_height["eager"]
    ]
    rows.append(["total", *(f"{summary[name]['bytes'] / 1e6:.1f}" for name in IMPLEMENTATIONS)])
    rows.append(["of eager", *(f"{summary[name]['of_eager']:.2f}" for name in IMPLEMENTATIONS)])
    title = f"MB that an image of {settings.size}x{settings.size} keeps for its backward, {settings.dtype}"
    return title + "\n\n" + markdown(["images of", "eager", "fastunet, ATen", "fastunet, Triton"], rows)


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    usual = Settings()
    parser.add_argument("what", choices=("kept", "moved"))
    parser.add_argument("--features", type=int, nargs="+", default=[*usual.features])
    parser.add_argument("--in-channels", type=int, default=usual.in_channels)
    parser.add_argument("--out-channels", type=int, default=usual.out_channels)
    parser.add_argument("--size", type=int, default=usual.size, help="side of the square images")
    parser.add_argument("--dtype", choices=[*DTYPES], default=usual.dtype)
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--norm", choices=("batch", "instance", "none"), default=usual.norm, help="of what is kept")
    parser.add_argument("--batch", type=int, default=usual.batch, help="images between which weights are moved once")
    parser.add_argument("--capability", type=int, nargs="+", choices=TARGETS, default=[90, 80], help="GPUs that move")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the tables; with --out write them as JSON. Returns 0."""
    least = 2 ** (len(options.features) - 1)
    if options.batch < 1 or options.size < least:
        parser.error(f"expected --batch from 1 and --size from {least}, got {options.batch} and {options.size}")
    settings = Settings(
        dtype=options.dtype,
        size=options.size,
        batch=options.batch,
        features=tuple(options.features),
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        norm=None if options.norm == "none" else options.norm,
    )
    try:
        found = _kept_report(settings) if options.what == "kept" else _moved_report(settings, options.capability)
    except ValueError as error:  # Of the model: channels below one, a single level.
        parser.error(str(error))
    if options.out is not None:
        write_json(options.out, found)
        print(options.out)
    return 0


def _kept_report(settings: Settings) -> dict[str, Any]:
    result = counted(settings)
    print(kept_table(result, settings))
    said = {name: getattr(settings, name) for name in ("features", "size", "dtype", "norm")}
    return result | {"settings": said, "environment": _environment("torch")}


def _moved_report(settings: Settings, capabilities: Sequence[int]) -> dict[str, Any]:
    dtype = settings.torch_dtype
    said = {name: getattr(settings, name) for name in ("features", "in_channels", "out_channels", "size", "batch")}
    found: dict[str, Any] = {"environment": _environment("triton"), "settings": said | {"dtype": settings.dtype}}
    for capability in capabilities:
        target = gpu.known_target(capability)
        rows, joined = net_traffic(settings, target, dtype)
        composed = composed_traffic(settings, target, dtype)
        print(f"## sm_{capability}\n\n{render(rows, joined, composed)}\n")
        every = [*rows, *([joined] if joined else []), *composed]
        found[f"sm_{capability}"] = {
            "summary": summarise(rows, joined, composed),
            "rows": [{**asdict(row), "l2_bytes_per_flop": row.l2_bytes_per_flop} for row in every],
        }
    return found


def _environment(package: str) -> dict[str, Any]:
    return {name: value for name, value in environment("cpu").items() if name in ("commit", "dirty", package)}
