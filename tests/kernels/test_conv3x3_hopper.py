"""The halo variant without a Hopper GPU: its source on a model of a thread block, against float64, and with faults put
in; its configurations; and how it is launched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, for the kernel's constants and descriptors")

from emulated_cta import Cta, Fault
from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_hopper, config_search, grad, hopper, pointer
from fastunet.kernels.epilogue import Epilogue, Head, Normalisation, Statistics
from gluon_source import Edit, Globals, run
from halo_faults import FAULTS

HOPPER = gpu.known_target(90)
MODES = len(Cta.MODES)


@dataclass(frozen=True)
class Case:
    """A convolution: batch, height, width, channels of both inputs and of the output; the kernel's blocks."""

    n: int = 1
    h: int = 20
    w: int = 17
    c1: int = 64
    c2: int = 0
    c_out: int = 64
    tile_h: int = 16
    block_n: int = 64
    slots: int = 2
    weight_slots: int = 2
    pool: bool = True
    norm: bool = False
    slope: float | None = 0.0
    classes: int = 0
    statistics: bool = False
    mask: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    @property
    def chosen(self) -> config.ConvConfig:
        return config.ConvConfig(
            *(self.tile_h, 8, self.block_n, 64, 4, self.slots, config.HALO),
            weight_stages=self.weight_slots,
        )


def random(*shape: int, seed: int) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return t.bfloat16().contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def check(case: Case, seed: int, edits: Sequence[Edit] = (), *, infinite: bool = False) -> None:
    """Fault, or AssertionError, unless all that the launch is to write comes out right, once each.

    infinite: one pixel is, and no weight is negative, so that it meets no other infinity.
    """
    x = random(case.n, case.c1, case.h, case.w, seed=1)
    up = random(case.n, case.c2, case.h, case.w, seed=2) if case.c2 else None
    weight = random(case.c_out, case.c1 + case.c2, 3, 3, seed=3)
    if infinite:
        x[0, 0, 3, 3], weight = math.inf, weight.abs()
    bias, mean, variance, gamma = (random(case.c_out, seed=4 + i) for i in range(4))
    variance = variance.abs() + 0.5
    y, pooled = (random(case.n, case.c_out, case.h // by, case.w // by, seed=0) for by in (1, 2))  # To be written.
    norm = Normalisation(mean, variance, gamma, 1e-3) if case.norm else None
    tiles = case.n * config.tiles_per_image(case.chosen, case.h, case.w)
    statistics = Statistics(torch.empty(tiles), torch.empty(2, tiles, case.c_out)) if case.statistics else None
    epilogue = Epilogue(y, bias, norm, case.slope, pooled if case.pool else None, statistics=statistics)
    if case.classes:  # In place of y.
        head_weight, head_bias = random(case.classes, case.c_out, 1, 1, seed=9), random(case.classes, seed=10)
        head_weight = head_weight.abs() if infinite else head_weight
        y = random(case.n, case.classes, case.h, case.w, seed=0)
        head = Head(head_weight, head_bias, sigmoid=case.classes == 1)
        epilogue = Epilogue(None, bias, norm, case.slope, head=head, probabilities=y)
    activated = random(case.n, case.c_out, case.h, case.w, seed=11) if case.mask else None
    if case.mask:
        epilogue = Epilogue(y, negative_slope=case.slope)
    launch = hopper.conv3x3_launch(x, up, weight, case.chosen, epilogue, activated)
    memory = run(launch, seed, edits)
    joined = x if up is None else torch.cat([x, up], 1)
    expected = F.conv2d(joined.double(), weight.double(), padding=1)
    if case.norm:
        expected = F.batch_norm(expected, mean.double(), variance.double(), gamma.double(), eps=1e-3)
    if activated is not None:
        (expected,) = torch.autograd.grad(
            F.leaky_relu(z := activated.double().requires_grad_(), case.slope), z, expected
        )
    else:
        expected += bias.double()[:, None, None]
        expected = expected if case.slope is None else F.leaky_relu(expected, case.slope)
    if case.classes:
        expected = F.conv2d(expected, head_weight.double(), head_bias.double())
        expected = expected.sigmoid() if case.classes == 1 else expected
    # Nothing is rounded but by float64 itself: what is wrong is off by more than a billionth.
    torch.testing.assert_close(memory.result(y), expected, rtol=0, atol=1e-9)
    if epilogue.pooled is not None and pooled.numel():
        torch.testing.assert_close(memory.result(pooled), F.max_pool2d(expected, 2), rtol=0, atol=1e-9)
    if statistics is not None:
        assert_statistics(memory, statistics, expected, case.tile_h)


def assert_statistics(memory: Globals, statistics: Statistics, expected: Tensor, tile_h: int) -> None:
    """A row for each tile."""
    rows = [rows for image in expected.unbind() for rows in image.split(tile_h, 1)]
    tiles = [tile.flatten(1) for each in rows for tile in each.split(config.TILE_W, 2)]
    for actual, of in (
        (memory.result(statistics.count), lambda v: torch.tensor(v.shape[1]).double()),
        (memory.result(statistics.partial)[0], lambda v: v.mean(1)),
        (memory.result(statistics.partial)[1], lambda v: v.var(1, correction=0) * v.shape[1]),
    ):
        torch.testing.assert_close(actual, torch.stack([of(v) for v in tiles]), rtol=0, atol=1e-9)


# On these, faults are to show; without, nothing does.
PROBES = [
    Case(n=2, h=33, w=20, weight_slots=6),
    Case(h=33, w=25, c2=64),
    Case(n=2, h=33, w=25, slots=3, statistics=True),
    Case(n=2, h=17, w=20, c_out=200, block_n=128, slots=3, weight_slots=3, statistics=True),
    # With slots enough for a whole tile a mask may come last.
    Case(n=2, h=33, w=20, c_out=128, block_n=128, slots=3, weight_slots=9, pool=False, mask=True),
    Case(n=2, h=33, w=40, slots=3, weight_slots=9, pool=False, slope=0.1, mask=True),
]
CASES = [
    *PROBES,
    *(
        Case(n=2, h=13, w=11, slots=slots, weight_slots=weight_slots)
        for slots, weight_slots in ((2, 2), (3, 4), (4, 3))
    ),
    Case(n=2, h=8, w=17, c2=128, c_out=128, slots=3, weight_slots=4, pool=False, norm=True),
    Case(h=17, w=23, c_out=128, block_n=128, weight_slots=3, slope=0.1),
    Case(h=40, w=8, c2=64, tile_h=32, slots=4),
    Case(h=17, w=9, c_out=72, block_n=128, slope=None),
    Case(n=3, h=1, w=1, pool=True),
    Case(n=1, h=3, w=200, norm=True),
    Case(n=2, h=17, w=23, c_out=72, pool=False, slope=None, statistics=True),
    Case(n=2, h=33, w=12, c_out=136, tile_h=32, block_n=128, c2=64, pool=False, slope=None, statistics=True),
    Case(n=2, h=33, w=20, c_out=72, tile_h=32, pool=False, mask=True),
    Case(n=2, h=17, w=12, c_out=136, block_n=128, pool=False, slope=0.1, mask=True),
    Case(n=2, h=18, w=31, classes=1),
    Case(n=2, h=18, w=15, classes=3, norm=True, c_out=40),
]


@pytest.mark.parametrize("seeds", [range(MODES), pytest.param(range(MODES, 20 * MODES), marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_the_model(case: Case, seeds: range) -> None:
    for seed in seeds:
        check(case, seed)


def test_a_head_beside_an_infinity() -> None:
    """Channels past the last, of 40 in a block of 64, are NaN there."""
    case = Case(h=6, w=9, classes=2, c_out=40)
    check(case, 0, infinite=True)
    with pytest.raises(AssertionError, match="not close"):
        check(case, 0, [("if COUT < n.shape[0]:", "if False:")], infinite=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str) -> None:
    """In some order of events of some probe; never as a success."""
    for seed in range(2 * MODES):
        for case in PROBES:
            try:
                check(case, seed, FAULTS[fault])
            except (Fault, AssertionError, TypeError):  # Sums still in flight are no numbers.
                return
    pytest.fail("every order of events passed")


# --- how it is launched ---


def test_input_gradients_are_convolutions_by_the_window_turned_around(monkeypatch: pytest.MonkeyPatch) -> None:
    cotangent, weight = random(2, 64, 9, 12, seed=1), random(64, 128, 3, 3, seed=2)
    monkeypatch.setattr(grad, "halo_runs", lambda *_: True)
    x = random(2, 128, 9, 12, seed=3)
    with autotune.overriding("conv3x3_input_grad", Case(c_out=128).chosen), gpu.recording(HOPPER) as launches:
        (out,) = grad.conv3x3_input_grads(cotangent, weight, [128])
        (masked,) = grad.conv3x3_input_grads(cotangent, weight, [128], x=x, negative_slope=0.0)
        grad.conv3x3_input_grads(cotangent, weight, [64, 64])
    assert [launch.kernel is hopper.conv3x3_hopper_kernel for launch in launches] == [True, True, False]
    expected = F.conv_transpose2d(cotangent.double(), weight.double(), padding=1)
    torch.testing.assert_close(run(launches[0], 0).result(out), expected, rtol=0, atol=1e-9)
    expected = torch.where(x > 0, expected, 0.0)
    torch.testing.assert_close(run(launches[1], 0).result(masked), expected, rtol=0, atol=1e-9)


def test_statistics_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(2, 64, 19, 12, seed=1), random(192, 64, 3, 3, seed=2)
    monkeypatch.setattr(pointer, "halo_runs", lambda *_: True)
    with autotune.overriding("conv3x3", Case(block_n=128).chosen), gpu.recording(HOPPER) as launches:
        y, statistics = pointer.conv3x3_with_statistics(x, weight)
    (launch,) = launches
    assert launch.kernel is hopper.conv3x3_hopper_kernel
    memory = run(launch, 0)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(memory.result(y), expected, rtol=0, atol=1e-9)
    assert_statistics(memory, statistics, expected, 16)


@pytest.mark.parametrize("may_run", [True, False])
def test_a_measured_choice_falls_back_where_the_variant_may_not_run(
    may_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But an override, by which a measurement asks for this variant, is an error there."""
    x, weight = random(1, 64, 9, 12, seed=1), random(64, 64, 3, 3, seed=2)
    reason = None if may_run else "the halo variant is wrong here"
    monkeypatch.setattr(config_hopper, "unsupported_reason", lambda *_: reason)
    chosen, shape = Case().chosen, config.ConvShape(64, 0, 64, 9, 12)
    heuristic = config.heuristic_conv_config(shape, torch.bfloat16, HOPPER, False)

    def choose(**options: bool) -> config.ConvConfig:
        return pointer.choose(x, None, weight, HOPPER, allow_tf32=False, **options)

    row = autotune.config_row("conv3x3", shape, torch.bfloat16, False, chosen)
    autotune.put(HOPPER.name, [row], keep=False)
    autotune._said.clear()
    message = "wrong here; the heuristic variant runs"
    with nullcontext() if may_run else pytest.warns(RuntimeWarning, match=message):
        assert choose() == (chosen if may_run else heuristic)
    with autotune.overriding("conv3x3", chosen):
        if may_run:
            assert choose() == chosen
        else:
            with pytest.raises(RuntimeError, match="the halo variant is wrong here"):
                choose()


def test_what_it_cannot_store_is_an_error() -> None:
    x, weight = random(1, 64, 9, 12, seed=1), random(64, 64, 3, 3, seed=2)
    head = {"head": Head(random(2, 64, 1, 1, seed=3), None, sigmoid=False), "probabilities": x[:, :2]}
    for chosen, epilogue in (
        (Case().chosen, Epilogue(x, **head)),
        (Case(block_n=128).chosen, Epilogue(None, **head)),
    ):
        with pytest.raises(ValueError, match="a head alone, and of at most 64 channels"):
            hopper.conv3x3_launch(x, None, weight, chosen, epilogue)


# --- configurations ---


@pytest.mark.parametrize(
    ("shape", "dtype", "target", "fits"),
    [
        (config.ConvShape(64, 0, 64, 8, 8), torch.bfloat16, HOPPER, True),
        (config.ConvShape(64, 128, 40, 8, 8), torch.float16, HOPPER, True),
        (config.ConvShape(64, 0, 64, 8, 8), torch.float32, HOPPER, False),
        (config.ConvShape(64, 0, 64, 8, 8), torch.bfloat16, gpu.known_target(100), False),
        (config.ConvShape(96, 0, 64, 8, 8), torch.bfloat16, HOPPER, False),
        (config.ConvShape(64, 32, 64, 8, 8), torch.bfloat16, HOPPER, False),
        (config.ConvShape(64, 0, 68, 8, 8), torch.bfloat16, HOPPER, False),
        (config.ConvShape(64, 0, 64, 8, 8, c_out2=64), torch.bfloat16, HOPPER, False),
    ],
)
def test_where_the_variant_fits(shape: config.ConvShape, dtype: torch.dtype, target: gpu.Target, fits: bool) -> None:
    assert config_hopper.fits_halo(shape, dtype, target) is fits
    variants = {
        each.variant for each in config_search.feasible_configs(config.CONV3X3, shape, dtype, target, allow_tf32=False)
    }
    assert (config.HALO in variants) is fits
    assert config.conv_config(shape, dtype, target, allow_tf32=False).variant != config.HALO, "nothing has measured it"


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("side", [8, 64, 512])
def test_a_search_tries_it_early_and_within_shared_memory(channels: int, side: int) -> None:
    shape = config.ConvShape(channels, 0, channels, side, side)
    found = config_search.feasible_configs(config.CONV3X3, shape, torch.bfloat16, HOPPER, allow_tf32=False)
    ours = [each for each in found if each.variant == config.HALO]
    assert found[1] == ours[0] == config_hopper.halo_config(shape, HOPPER)
    assert len(ours) == len(set(ours)) > 10
    assert all(config_hopper.shared_memory(each) <= HOPPER.shared_memory for each in ours)
