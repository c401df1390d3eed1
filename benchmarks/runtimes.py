"""Runtimes that people export their nets to, as providers of a net's inference on a CPU: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastunet

NAMES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the runtime is not measured there, "" where it is."""
    if device.type != "cpu":
        return "measured on CPUs only"
    if name == "ONNX Runtime" and dtype != torch.float32:
        return "its convolutions on a CPU are in float32"
    missing = [each for each in (NAMES[name], "onnxscript") if importlib.util.find_spec(each) is None]
    return f"needs {missing[0]}: pip install 'fastunet[runtimes]'" if missing else ""


def prepare(
    name: str, dtype: torch.dtype, model: fastunet.UNet, x: Tensor, target: Tensor | None = None
) -> Callable[[], Any]:
    """Export the reference model for images of x's shape and load it, with as many threads as torch has."""
    plain, image = model.to_reference().eval(), x.float().contiguous()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(plain, (image,), dynamo=True, input_names=["x"], verbose=False)
    assert program is not None
    onnx = program.model_proto.SerializeToString()
    session = _onnx_runtime(onnx) if name == "ONNX Runtime" else _openvino(onnx, dtype)
    pixels = image.numpy()
    return lambda: torch.from_numpy(session(pixels))


def _onnx_runtime(onnx: bytes) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"x": image})[0]


def _openvino(onnx: bytes, dtype: torch.dtype) -> Callable[[Any], Any]:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = core.compile_model(core.read_model(onnx), "CPU", settings).create_infer_request()
    # Its own memory is handed out: as in the others, a run's result is a tensor that the next overwrites at most.
    return lambda image: request.infer({"x": image})[0]
