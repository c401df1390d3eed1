"""The sums of the segmentation losses, and their gradient, against float64 under the derived tolerance."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import check_tests, load
from kernel_device import DEVICE, DTYPES, MARK
from torch import Tensor

from fastunet.testing import (
    LAYOUTS,
    assert_within,
    in_layout,
    random_cotangent,
    random_input,
    segmentation_sums_expected,
    segmentation_sums_grad_expected,
)

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]

KERNELS = load()
TARGETS = ("soft", "bytes", "bools", "indices", "small_indices", "float_indices")


def make_target(logits: Tensor, kind: str, seed: int = 2) -> Tensor:
    """Values from 0 to 1, or class indices."""
    n, c, h, w = logits.shape
    generator = torch.Generator().manual_seed(seed)
    if "indices" in kind and c > 1:
        labels = torch.randint(0, c, (n, 1, h, w), generator=generator)
        dtype = {"small_indices": torch.uint8, "float_indices": torch.float32}.get(kind, torch.int64)
        return labels.to(device=logits.device, dtype=dtype)
    values = torch.rand((n, c, h, w), generator=generator)
    kinds = {"bytes": torch.uint8, "bools": torch.bool}
    return (values.round().to(kinds[kind]) if kind in kinds else values).to(logits.device)


def make_mask(logits: Tensor) -> Tensor:
    n, _, h, w = logits.shape
    return (torch.rand((n, 1, h, w), generator=torch.Generator().manual_seed(3)) < 0.75).to(logits.device)


def check(
    kernels: ModuleType, logits: Tensor, target: Tensor, mask: Tensor | None, *, entropy: bool, **options: bool
) -> None:
    """Sums and gradient: values, dtypes and shapes."""
    sums = kernels.segmentation_loss.segmentation_sums(logits, target, mask, entropy=entropy, **options)
    assert sums.dtype == torch.float32
    assert_within(sums, *segmentation_sums_expected(logits, target, mask, entropy=entropy, **options))
    grad = random_cotangent(sums)
    actual = kernels.segmentation_loss.segmentation_sums_grad(grad, logits, target, mask, **options)
    assert actual.dtype == logits.dtype
    assert_within(actual, *segmentation_sums_grad_expected(grad, logits, target, mask, **options))


# n, c, h, w: one pixel, less than a block, several blocks and parts with a rest, and no image.
SHAPES = ((2, 1, 33, 65), (1, 3, 1, 1), (2, 5, 13, 11), (1, 17, 33, 9), (0, 2, 4, 4))


# Each shape with either activation and either kind of target, each of these in turn, as is the dtype.
CASES = [
    (shape, softmax, "indices" if (i + softmax) % 2 else "soft", DTYPES[(i + softmax) % 3])
    for i, shape in enumerate(SHAPES)
    for softmax in (False, True)
]


@pytest.mark.parametrize(("shape", "softmax", "kind", "dtype"), CASES, ids=str)
def test_sums_and_gradient(shape: tuple[int, ...], softmax: bool, kind: str, dtype: torch.dtype) -> None:
    logits = random_input(shape, dtype=dtype, layout="contiguous", scale=3.0, device=DEVICE)
    check(KERNELS, logits, make_target(logits, kind), None, softmax=softmax, squared=False, entropy=True)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(
    n=st.integers(0, 3),
    c=st.sampled_from([1, 2, 3, 5, 17]),
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    kind=st.sampled_from(TARGETS),
    masked=st.booleans(),
    scale=st.sampled_from([1.0, 8.0, 40.0]),
    softmax=st.booleans(),
    squared=st.booleans(),
    entropy=st.booleans(),
)
def test_anything(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, layouts: tuple[str, str, str], kind: str, masked: bool,
    scale: float, softmax: bool, squared: bool, entropy: bool,
) -> None:  # fmt: skip
    logits = in_layout(random_input((n, c, h, w), dtype=dtype, scale=scale, device=DEVICE), layouts[0])
    target = make_target(logits, kind)
    if target.is_floating_point() or layouts[1] not in ("sliced", "unaligned"):  # Those are cut out of NaN.
        target = in_layout(target, layouts[1])
    mask = in_layout(make_mask(logits).to(dtype), layouts[2]) if masked else None
    check(KERNELS, logits, target, mask, softmax=softmax, squared=squared, entropy=entropy)


def test_layouts_are_read_and_written_as_they_are() -> None:
    logits = random_input((2, 3, 5, 4), device=DEVICE)
    options = {"softmax": True, "squared": False}
    for layout, same in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        x = in_layout(logits, layout)
        assert KERNELS.segmentation_loss._tensor("x", x)["x_ptr"] is x
        sums = KERNELS.segmentation_loss.segmentation_sums(x, make_target(x, "soft"), None, entropy=False, **options)
        grad = KERNELS.segmentation_loss.segmentation_sums_grad(sums, x, make_target(x, "soft"), None, **options)
        assert grad.is_contiguous(memory_format=same)
    window = logits[:, 1:, :, :]
    assert KERNELS.segmentation_loss._tensor("x", window)["x_ptr"] is window
    assert KERNELS.segmentation_loss._tensor("x", logits[..., 1:])["x_ptr"].is_contiguous()


def test_a_pass_over_nothing() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape, device=DEVICE)
        sums = KERNELS.segmentation_loss.segmentation_sums(x, x, None, softmax=True, squared=False, entropy=True)
        assert torch.equal(sums, torch.zeros((4, *shape[:2]), device=DEVICE))
        assert (
            KERNELS.segmentation_loss.segmentation_sums_grad(sums, x, x, None, softmax=True, squared=False).shape
            == shape
        )


# --- what catches the injected faults ---


def sums_of(kernels: ModuleType, c: int, **options: bool) -> None:
    """Several blocks and parts with a rest, of values and a mask, and of class indices."""
    logits = random_input((1, c, 33, 37), scale=2.0, layout="contiguous", device=DEVICE)
    for kind, mask in (("soft", make_mask(logits)), ("indices", None)):
        check(kernels, logits, make_target(logits, kind), mask, entropy=True, **options)


def sigmoid_sums(kernels: ModuleType) -> None:
    sums_of(kernels, 1, softmax=False, squared=False)
    sums_of(kernels, 3, softmax=False, squared=True)


def softmax_sums(kernels: ModuleType) -> None:
    sums_of(kernels, 5, softmax=True, squared=False)


def nan_and_saturation(kernels: ModuleType) -> None:
    """NaN reaches the sums of its own image and channel, with softmax of its image, and of the gradient its own
    pixel; logits that saturate stay finite.
    """
    for softmax in (False, True):
        logits = random_input((3, 3, 5, 7), layout="contiguous", device=DEVICE)
        logits[0] = torch.tensor([-1e30, -200.0, 200.0], device=DEVICE)[:, None, None]
        logits[1, 1, 2, 3] = math.nan
        target = make_target(logits, "soft").round()
        target[0] = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)[:, None, None]
        sums = kernels.segmentation_loss.segmentation_sums(
            logits, target, None, softmax=softmax, squared=False, entropy=True
        )
        expected = torch.zeros_like(sums, dtype=torch.bool)
        expected[:, 1, :] = softmax
        expected[:, 1, 1] = True
        expected[2] = False  # The target's own sum.
        assert torch.equal(sums.isnan(), expected)
        assert torch.equal(sums[3:, 0], torch.zeros_like(sums[3:, 0]))
        grad = kernels.segmentation_loss.segmentation_sums_grad(
            random_cotangent(sums), logits, target, None, softmax=softmax, squared=False
        )
        expected = torch.zeros_like(grad, dtype=torch.bool)
        expected[1, :, 2, 3] = softmax
        expected[1, 1, 2, 3] = True
        assert torch.equal(grad.isnan(), expected)


def confident_pixels(kernels: ModuleType) -> None:
    """Where p is next to 1, its cross entropy is next to 0, yet good to a few of its last places."""
    logits = torch.linspace(4.0, 30.0, 60, device=DEVICE).reshape(60, 1, 1, 1)
    ones = torch.ones_like(logits)
    for sign in (1.0, -1.0):
        target = ones if sign > 0 else 1 - ones
        check(kernels, sign * logits, target, None, softmax=False, squared=True, entropy=True)


def labels_of_no_class(kernels: ModuleType) -> None:
    """A class without probability costs nothing where it is not the label; an index that is no class is NaN unless
    masked out.
    """
    logits = random_input((3, 4, 5, 5), layout="contiguous", device=DEVICE)
    logits[:, 3] = -math.inf
    labels = make_target(logits[:, :3], "indices")
    options = {"softmax": True, "squared": False}
    sums = kernels.segmentation_loss.segmentation_sums(logits, labels, None, entropy=True, **options)
    expected = segmentation_sums_expected(logits[:, :3], labels, None, entropy=True, **options)
    assert_within(sums[:, :, :3], *expected)
    assert torch.equal(sums[:, :, 3], torch.zeros_like(sums[:, :, 3]))
    for wrong in (4, -1, 255):
        labels[1, 0, 2, 2] = wrong
        of_wrong = kernels.segmentation_loss.segmentation_sums(logits, labels, None, entropy=True, **options)
        assert of_wrong[:, 1, :3].isnan()[[0, 2, 3]].all()
        assert torch.equal(of_wrong[:, ::2], sums[:, ::2])
        mask = labels != wrong
        masked = kernels.segmentation_loss.segmentation_sums(logits, labels, mask, entropy=True, **options)
        expected = segmentation_sums_expected(logits[:, :3], labels, mask, entropy=True, **options)
        assert_within(masked[:, :, :3], *expected)


test_check, test_injected_fault_is_caught = check_tests({
    sigmoid_sums: [
        ("segmentation_loss", "predicted += tl.where(inside, ", "predicted += tl.where(c[None, :] < C, "),
        ("segmentation_loss", "negative += tl.where(inside, ", "negative += tl.where(c[None, :] < C, "),
        ("segmentation_loss", "first + blocks_per_split, blocks)", "first + blocks_per_split, blocks - 1)"),
        ("segmentation_loss", "p += BLOCK_P", "p += 0"),
        ("segmentation_loss", "out + row, tl.sum(predicted", "out + row, tl.sum(truth"),
        ("segmentation_loss", "pm = prob * m\n", "pm = prob\n"),
        ("segmentation_loss", "(g * m).to", "g.to"),
        ("segmentation_loss", "tm * tm if SQUARED else tm", "tm"),
        ("segmentation_loss", "2.0 * (prob * m) if SQUARED", "prob * m if SQUARED"),
        ("segmentation_loss", "grad_ptr + 4 * row", "grad_ptr + 3 * row"),
    ],
    softmax_sums: [
        ("reduction", "tl.sum(sums, 0)", "tl.sum(tl.where(row > 0, sums, 0.0), 0)"),
        ("segmentation_loss", "tl.where(c[None, :] < C, tl.exp(z), 0.0)", "tl.exp(z)"),
        ("segmentation_loss", "dp - tl.sum(dp * prob, 1)[:, None]", "dp"),
        ("segmentation_loss", "prob * tl.sum(w, 1)[:, None] - w", "prob * w - w"),
    ],
    nan_and_saturation: [
        ("segmentation_loss", "-tl.abs(x)", "-tl.abs(tl.where(x == x, x, 0.0))"),
        ("segmentation_loss", "z = x - top", "z = x"),
    ],
    confident_pixels: [
        ("segmentation_loss", "tl.log(rounded) + (e - (rounded - 1.0)) * s", "tl.log(rounded)"),
        ("segmentation_loss", "tl.where(x >= 0, e * s, s), log_sum", "1.0 - tl.where(x >= 0, s, e * s), log_sum"),
    ],
    labels_of_no_class: [
        ("segmentation_loss", "inside & (t != 0.0) if INDEX else inside", "inside"),
        ("segmentation_loss", 'float("nan"), t)', "t, t)"),
        ("segmentation_loss", " & (m != 0.0)", ""),
    ],
})  # fmt: skip
