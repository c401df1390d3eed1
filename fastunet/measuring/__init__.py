"""Measure layers on this GPU: our kernels, checked once before, against ATen.

A layer is measured when it first runs, or ahead by `fastunet.tune`, on random tensors of its size: ours with the
heuristic configurations of its kernels and a few of their neighbours, and ATen with the algorithms that cuDNN finds
fastest. What is found is put into `kernels.autotune`'s table, by which `dispatch` chooses. Ours wins where it is faster
by dispatch.LEAST_SPEEDUP in nine rounds of ten.

Of each process FASTUNET_TUNE_SECONDS (20) go to this, compiling included; the check of the kernels, once in an
environment, has its own limit. What is left over runs on ATen until the next time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastunet import dispatch, torch_private
from fastunet.checks import ConfigError, DataError
from fastunet.files import locked
from fastunet.kernels import autotune, gpu, self_test
from fastunet.measuring.timing import Quantiles, clock_of, cudnn_benchmark, interleaved_samples, ratio, sets_past_cache

# Configurations of a kernel that are tried beside the heuristic one.
FEW = 2
_ROUNDS, _SECONDS = 30, 0.4
NO_TIME = "no time was left (FASTUNET_TUNE_SECONDS)"
# Of a layer's arguments, those that have no gradient.
_CONSTANTS = ("target", "mask", "running_mean", "running_var", "mean", "variance")

T = TypeVar("T")
Call = Callable[[Any], Any]
Run = Callable[[], Any]
Runs = Mapping[str, Sequence[Run]]


class Budget:
    """Seconds to measure in, of which only those within `spend` pass."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._left, self._now = seconds, now
        self._begun: float | None = None

    @property
    def left(self) -> float:
        """Return the seconds that are left, none or fewer when it is spent."""
        return self._left - (0.0 if self._begun is None else self._now() - self._begun)

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Count the time of the block."""
        self._begun = self._now()
        try:
            yield
        finally:
            self._left, self._begun = self.left, None


def _seconds_of_a_process() -> float:
    text = os.environ.get("FASTUNET_TUNE_SECONDS", "20")
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"FASTUNET_TUNE_SECONDS: expected a number, got {text!r}") from None


process_budget = Budget(_seconds_of_a_process())


def settle(call: Call, args: Any, choice: dispatch.Choice) -> dispatch.Choice:
    """Return what runs an op on args now, when `choice` knows nothing of the layer: first measure it, if this may be.

    call: calls the op with args like these, a NamedTuple with a `choice`. Not measured is under tracing and the capture
    of a graph, on another thread than the main one, beside which others may run ops, and where
    `dispatch.is_to_measure` says no.
    """
    layer = choice.unmeasured
    is_main = threading.current_thread() is threading.main_thread()
    if layer is None or not (is_main and dispatch.is_to_measure(choice, args[0].device) and _runs_now()):
        return choice
    measure(call, args, layer, process_budget)
    return args.choice(training=layer.training)


def failure_of(family: str, dtype: str, device: torch.device) -> str:
    """Return what is wrong on a GPU with kernels that are measured against no others, "" if nothing: they are checked
    now where they were not, if this may be.
    """
    known = autotune.look_up(gpu.target(device).name, family, dtype, {})
    if "failed" not in known and dispatch.tunes_at_first_use() and _runs_now():
        return self_test.check([family], dtype, device)[family]
    return known.get("failed", "")


def _runs_now() -> bool:
    """Whether what is called is computed at once: not traced, captured by a graph, or seen by a mode, as of fakes."""
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (is_captured or torch.compiler.is_compiling() or torch_private.dispatch_modes())


def measure(
    call: Call,
    args: Any,
    layer: autotune.Layer,
    budget: Budget,
    neighbours: int | None = FEW,
    compiled: Call | None = None,
) -> None:
    """Put into the table how fast the layer of such a call is, after its kernels' check where there was none.

    neighbours: configurations of each kernel to try beside the heuristic one, None for all. compiled: what inductor
    makes of the same by ATen's ops, to be measured as well.
    """
    from fastunet.kernels.conv3x3 import config_hopper

    name, dtype = _place(args)
    if budget.left <= 0:
        skip(args, layer, NO_TIME)
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(autotune.cache_file(name).parent))
        except DataError:  # Its work would disturb our times, and ours its.
            autotune.warn_once("another process is measuring: until it is done, what is not measured runs on ATen")
            return
        except OSError:  # There is no place to write, as `put` will say.
            pass
        autotune.refresh(name)
        has_halo = config_hopper.missing(args[0].dtype, gpu.target(args[0].device)) is None
        families = [*dispatch.TRITON_OPS, *([config_hopper.FAMILY] if has_halo else [])]
        failed = self_test.check(families, dtype, args[0].device)[layer.op]
        if failed or "speedup" in autotune.look_up(name, layer.op, dtype, layer.shape):
            return
        row = {"op": layer.op, "dtype": dtype, "shape": layer.shape}
        try:
            with budget.spend():
                options = layer, budget, neighbours, compiled
                rows = within_memory(lambda batch: _compare(call, args, batch, *options), args)
        except torch.OutOfMemoryError:
            skip(args, layer, "it does not fit into memory twice")
            return
        except Exception as error:  # A compiler's, a driver's, or that results are wrong.
            rows = [{"failed": f"{type(error).__name__}: {error}"[:300]}]
            autotune.warn_once(f"{layer} in {dtype} does not run on Triton on {name}: {rows[0]['failed']}")
        autotune.put(name, [row | rows[0], *rows[1:]])


def skip(args: Any, layer: autotune.Layer, reason: str) -> None:
    """Leave the layer to ATen in this process."""
    name, dtype = _place(args)
    autotune.put(name, [{"op": layer.op, "dtype": dtype, "shape": layer.shape, "skipped": reason}], keep=False)


def _place(args: Any) -> tuple[str, str]:
    """The names of the GPU and of the format by which a table knows a call."""
    return gpu.target(args[0].device).name, autotune.format_of(args[0].dtype, dispatch.tf32_allowed())


def within_memory(function: Callable[[int], T], args: Any) -> T:
    """Return function(number of images) of as many images of the call as fit into memory, else raise OutOfMemoryError.

    It runs in a thread of its own, which knows of no autocast, modes or dispatch keys that are in force here.
    """
    device, batch = args[0].device, args[0].shape[0]

    def run() -> T:
        with gpu.current(device):
            return function(batch)

    while True:
        try:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(run).result()
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()


def _compare(
    call: Call,
    args: Any,
    batch: int,
    layer: autotune.Layer,
    budget: Budget,
    neighbours: int | None,
    compiled: Call | None,
) -> list[autotune.Row]:
    """Time ours, with the best of the configurations, and ATen: what is known of the layer, and the kernels' rows."""
    from fastunet.kernels.conv3x3 import config_search

    device = args[0].device
    first = synthetic(args, batch)
    copies = sets_past_cache([t for t in first if isinstance(t, Tensor)], device)
    sets = [first, *(synthetic(args, batch) for _ in range(copies - 1))]
    ours, aten = ([run_of(call, each, layer, backend) for each in sets] for backend in ("triton", "aten"))
    expected = aten[0]()
    with autotune.configs_asked() as asked:
        assert_alike(ours[0](), expected)
    best: dict[tuple[str, Any], Any] = {}  # By op and shape: inputs of other channels have gradients of other shapes.
    rows = []
    for op, shape, dtype, allow_tf32 in dict.fromkeys(asked):
        candidates = config_search.feasible_configs(op, shape, dtype, gpu.target(device), allow_tf32=allow_tf32)

        def prepare(config: Any, key: tuple[str, Any] = (op, shape)) -> list[Run]:
            runs = [_overridden(run, {**best, key: config}) for run in ours]
            assert_alike(runs[0](), expected)
            return runs

        few = candidates if neighbours is None else candidates[: 1 + neighbours]
        best[op, shape] = search(few, prepare, lambda runs: _timed(runs, device), budget)
        rows.append(autotune.config_row(op, shape, dtype, allow_tf32, best[op, shape]))
    runs = {"ours": [_overridden(run, best) for run in ours], "aten": aten}
    if compiled is not None:
        with contextlib.suppress(Exception):  # The compiler's: without it, ours has to gain more over ATen.
            inductor = [run_of(compiled, each, layer, "aten") for each in sets]
            assert_alike(inductor[0](), expected)
            runs["inductor"] = inductor
    samples = _timed(runs, device)
    times = ratio(samples, "aten", "ours")
    row: autotune.Row = {"speedup": times.p10, "median": times.median, "samples": times.samples}
    if "inductor" in runs:
        row["over_inductor"] = ratio(samples, "inductor", "ours").p10
    return [row, *rows]


def search(
    candidates: Sequence[Any],
    prepare: Callable[[Any], Sequence[Run]],
    timed: Callable[[Runs], Mapping[str, Sequence[float]]],
    budget: Budget,
) -> Any:
    """Return the fastest of the candidates, or the heuristic one, candidates[0], unless another is faster in nine
    rounds of ten of a timing of these two: the best of many samples is always flattered.

    prepare: compiles and checks one; what is wrong, or does not run, is left out. No further one is prepared when the
    budget is spent. An error of the heuristic one passes through.
    """
    runs = {"0": prepare(candidates[0])}
    for i, candidate in enumerate(candidates[1:], 1):
        if budget.left <= 0:
            break
        with contextlib.suppress(Exception):  # A compiler's, too many resources, or wrong results.
            runs[str(i)] = prepare(candidate)
    if len(runs) == 1:
        return candidates[0]
    samples = timed(runs)
    best = min(runs, key=lambda name: Quantiles.of(samples[name]).median)
    if best != "0" and ratio(timed({"0": runs["0"], best: runs[best]}), "0", best).p10 <= 1:
        best = "0"
    return candidates[int(best)]


def _timed(runs: Runs, device: torch.device) -> dict[str, list[float]]:
    with cudnn_benchmark():
        return interleaved_samples(runs, clock_of(device), rounds=_ROUNDS, seconds=_SECONDS)


def _overridden(run: Run, configs: Mapping[tuple[str, Any], Any]) -> Run:
    def overridden() -> Any:
        with contextlib.ExitStack() as stack:
            for (op, shape), config in configs.items():
                stack.enter_context(autotune.overriding(op, config, shape))
            return run()

    return overridden


def run_of(call: Call, args: Any, layer: autotune.Layer, backend: str) -> Callable[[], tuple[list, list]]:
    """Return what calls the op, in training with its gradients, and gives its results and those."""
    cotangents: list[Tensor] = []

    def run() -> tuple[list[Tensor], list[Tensor]]:
        with dispatch.backend(backend), torch.set_grad_enabled(layer.training):
            found = call(args)
            outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None and t.numel()]
            if not layer.training:
                return outputs, []
            outputs = [t for t in outputs if t.requires_grad]
            leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
            cotangents.extend(_normal_like(t) for t in outputs[len(cotangents) :])  # At the first run.
            return outputs, [*torch.autograd.grad(outputs, leaves, cotangents)]

    return run


def _normal_like(t: Tensor) -> Tensor:
    """Random numbers in t's shape and format, the same for equal shapes; torch's own generator, on which the results of
    whoever is measuring may depend, is left as it is.
    """
    generator = torch.Generator(t.device).manual_seed(0)
    return torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator, device=t.device))


def synthetic(args: Any, batch: int) -> Any:
    """Return arguments like these, on so many images, of random values; those to have gradients ask for them."""
    tensors = {name: t for name, t in zip(args._fields, args, strict=True) if isinstance(t, Tensor)}
    differentiable = [name for name, t in tensors.items() if t.requires_grad]
    # Of a fake call nothing is known: then all that can have one.
    differentiable = differentiable or [
        name for name, t in tensors.items() if name not in _CONSTANTS and t.is_floating_point()
    ]
    made = {name: _random(name, t, batch).requires_grad_(name in differentiable) for name, t in tensors.items()}
    return args._replace(**made)


def _random(name: str, t: Tensor, batch: int) -> Tensor:
    shape = t.shape if t.dim() != 4 or "weight" in name else (batch, *t.shape[1:])
    is_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if is_last else torch.contiguous_format
    values = torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=format)
    if not t.is_floating_point():  # Class indices.
        return values.zero_()
    values = _normal_like(values)
    if "weight" in name:  # So that sums stay near 1.
        values *= (values[0].numel()) ** -0.5
    return values.abs_().add_(0.5) if "var" in name else values


def assert_alike(actual: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    """Raise AssertionError unless results, and gradients, are near those of ATen: a last look at the size of the layer,
    whose kernels have passed their check on small images.

    Relative, in the 2-norm. Results that are each rounded a few times differ by a few units. Gradients also by whole
    pixels, where an activation's sign or a window's winner hangs on that: about the same share of all, and so by its
    square root.
    """
    for whole, share in zip(actual, expected, strict=True):
        for result, reference in zip(whole, share, strict=True):
            allowed = max(8 * torch.finfo(reference.dtype).eps, 2.0**-10)
            allowed = allowed if whole is actual[0] else allowed**0.5
            off, size = (result.float() - reference.float()).norm(), reference.float().norm()
            if not off <= allowed * size:  # NaN is not.
                raise AssertionError(f"off by {float(off / size):.1e} of ATen's result, allowed {allowed:.1e}")
