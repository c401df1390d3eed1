"""Where the tests of inference by oneDNN run."""

from __future__ import annotations

import pytest
import torch

from fastunet import dispatch

MARKS = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"),
    pytest.mark.skipif(dispatch.selected_backend() != "auto", reason="FASTUNET_BACKEND is not auto"),
    pytest.mark.usefixtures("layers_of_any_size"),
]
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)
