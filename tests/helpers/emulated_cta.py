"""A model of one thread block of a Hopper GPU, for kernels that synchronise by hand: what a race, a deadlock or a wrong
count would do on hardware is a `Fault` here.

Warps are generators that a scheduler moves on one step at a time, in random order, or so that one party starves.
A barrier has a count, arrivals and bytes still awaited, and a phase. A load lands in pieces at random later times, with
zeros for what lies outside the tensor; a store reads its source at a random later time; a matrix product reads its
operands and adds to its sums at a random later time, in the order of its warpgroup. Values are float64, and nothing is
rounded. Not modelled: the warps of a warpgroup one by one, swizzles, registers, time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Steps = Generator[Any, None, Any]
Condition = Callable[[], bool]


class Fault(AssertionError):
    """What the hardware would not have forgiven."""


class Registers(np.ndarray):
    """A tensor in registers: conversions of type and layout leave its values."""

    def to(self, _: Any) -> Registers:
        return self


def registers(values: Any) -> Registers:
    return np.asarray(values, dtype=np.float64).view(Registers)


def until(condition: Condition) -> Steps:
    yield
    while not condition():
        yield condition


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes have come."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.arrivals = count

    def wait(self, parity: int) -> Steps:
        return until(lambda: (self.phase & 1) != parity)

    def arrive(self, pred: Any = True) -> Steps:
        yield
        if pred:
            self._settle(1, 0)

    def expect(self, size: int) -> Steps:
        yield
        self._settle(1, size)

    def land(self, size: int) -> None:
        self._settle(0, -size)

    def _settle(self, arrived: int, size: int) -> None:
        self.arrivals -= arrived
        self.bytes += size
        if self.arrivals < 0:
            raise Fault("more arrivals than a barrier's count")
        if self.arrivals == 0 and self.bytes == 0:
            self.phase += 1
            self.arrivals = self.count


@dataclass(eq=False)
class Memory:
    """A view of shared memory; its values begin at `first` of their allocation."""

    cta: Cta
    allocation: np.ndarray
    first: int
    values: np.ndarray
    layout = None

    def index(self, i: int) -> Memory:
        if not 0 <= i < len(self.values):
            raise Fault(f"index {i} of {len(self.values)}")
        return Memory(self.cta, self.allocation, self.first + i * self.values[0].size, self.values[i])

    def permute(self, _: Any) -> Memory:
        return Memory(self.cta, self.allocation, self.first, self.values.T)

    def viewed(self, shape: Sequence[int]) -> Memory:
        last = self.first + int(np.prod(shape))
        if last > len(self.allocation):
            raise Fault("a view beyond its memory")
        return Memory(self.cta, self.allocation, self.first, self.allocation[self.first : last].reshape(shape))

    def load(self, _: Any) -> Registers:
        if self.cta.fills(self.values):
            raise Fault("memory read before its data have come")
        return registers(self.values.copy())

    def store(self, values: np.ndarray) -> Steps:
        yield
        if self.cta.reads(self.values):
            raise Fault("memory rewritten while a copy still reads it")
        if self.cta.fills(self.values):
            raise Fault("memory written while a load fills it")
        self.values[...] = values
        self.cta.unfenced.setdefault(self.cta.running, []).append(self.values)


@dataclass(eq=False)
class Descriptor:
    """A strided view of a tensor in global memory and the box in which it is copied. written: how often each value."""

    tensor: np.ndarray
    box: tuple[int, ...]
    written: np.ndarray
    dtype = layout = None

    def overlap(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The part of the box at these coordinates that lies in the tensor: in the box, and in the tensor."""
        low = [max(0, -c) for c in at]
        high = [min(size, extent - c) for size, extent, c in zip(self.box, self.tensor.shape, at, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        return (
            tuple(slice(a, b) for a, b in zip(low, high, strict=True)),
            tuple(slice(c + a, c + b) for c, a, b in zip(at, low, high, strict=True)),
        )


@dataclass(eq=False)
class Sums:
    """An accumulator that products in flight may still change."""

    values: Registers


class Event(NamedTuple):
    """What is still to happen, after all before it in a queue where that is of products: ("load", any number),
    ("store", whose) or ("product", whose). memory: what it reads, or, of a load, what it fills.
    """

    queue: tuple[str, Any]
    happen: Callable[[], None]
    memory: Sequence[np.ndarray]


class Cta:
    """One thread block. `mode` says who is moved on: anyone ("mixed"), warps before copies and products ("lazy") or
    after them ("eager"), or everyone before the party of that name.
    """

    MODES = ("mixed", "lazy", "eager", "load", "product", "store", "warps 0", "warps 1", "warps 2")

    def __init__(self, seed: int, number: int, grid: int) -> None:
        self.random = random.Random(seed)
        self.number, self.grid, self.mode = number, grid, self.MODES[seed % len(self.MODES)]
        self.running = "main"
        self.tasks: dict[str, tuple[Steps, Condition | None]] = {}
        self.events: list[Event] = []
        self.weights: dict[Any, float] = {}
        # What warps have written and not yet shown to the hardware that copies.
        self.unfenced: dict[str, list[np.ndarray]] = {}

    # --- the scheduler ---

    def run(self, main: Steps) -> None:
        """To the end, or to a Fault."""
        self.tasks["main"] = main, None
        while self.tasks:
            self._step()
        while self.events:
            self.events.pop(self.random.randrange(len(self.events))).happen()

    def _step(self) -> None:
        ready = [name for name, (_, condition) in self.tasks.items() if condition is None or condition()]
        queues = list(dict.fromkeys(event.queue for event in self.events))
        if not ready and not queues:
            raise Fault("deadlock")
        chosen = self._choose(ready, queues)
        if chosen in ready:
            self.running = chosen
            steps = self.tasks[chosen][0]
            try:
                self.tasks[chosen] = steps, next(steps)
            except StopIteration:
                del self.tasks[chosen]
            return
        same = [i for i, event in enumerate(self.events) if event.queue == chosen]
        in_order = chosen[0] == "product"
        self.events.pop(same[0] if in_order else self.random.choice(same)).happen()

    def _choose(self, ready: list[str], queues: list[Any]) -> Any:
        candidates: list[Any] = ready + queues
        if self.mode == "lazy" and ready:
            candidates = list(ready)
        elif self.mode == "eager" and queues:
            candidates = queues
        candidates = [c for c in candidates if self.mode not in (c, c[0])] or candidates
        for each in candidates:
            self.weights.setdefault(each, self.random.choice((0.03, 0.3, 1, 1, 5)))
        return self.random.choices(candidates, [self.weights[each] for each in candidates])[0]

    def specialise(self, parts: Sequence[tuple[Callable[..., Steps], Sequence[Any]]], *_: Any) -> Steps:
        yield
        names = [f"warps {i}" for i in range(len(parts))]
        for name, (function, arguments) in zip(names, parts, strict=True):
            self.tasks[name] = function(*arguments), None
        yield from until(lambda: not any(name in self.tasks for name in names))

    def _wait(self, what: str, pending: int) -> Steps:
        """Until no more of the running party's products or stores are in flight."""
        queue = what, self.running
        return until(lambda: sum(event.queue == queue for event in self.events) <= pending)

    # --- shared memory ---

    def allocate(self, shape: Sequence[int]) -> Memory:
        allocation = np.full(int(np.prod(shape)), np.nan)
        return Memory(self, allocation, 0, allocation.reshape(shape))

    def fence(self) -> Steps:
        yield
        self.unfenced[self.running] = []

    def fills(self, values: np.ndarray) -> bool:
        """Whether a load in flight does, any of them."""
        return any(event.queue[0] == "load" and _meet(values, event.memory) for event in self.events)

    def reads(self, values: np.ndarray) -> bool:
        """Whether a store or a product in flight does."""
        return any(event.queue[0] != "load" and _meet(values, event.memory) for event in self.events)

    # --- copies ---

    def load(self, source: Descriptor, at: Sequence[int], barrier: Barrier, target: Memory, pred: Any = True) -> Steps:
        yield
        if not pred:
            return
        if target.values.size != int(np.prod(source.box)):
            raise Fault(f"a box of {source.box} does not fill {target.values.shape}")
        if self.reads(target.values):
            raise Fault("a slot overwritten while it is read")
        if self.fills(target.values):
            raise Fault("two loads into one slot")
        values, parts = np.zeros(source.box), source.overlap(at)
        if parts is not None:
            values[parts[0]] = source.tensor[parts[1]]
        pieces, filled, size = values.reshape(-1), target.values.reshape(-1), values.size
        cuts = sorted({0, size, *(self.random.randrange(size) for _ in range(self.random.randrange(3)))})
        for low, high in itertools.pairwise(cuts):

            def land(part: np.ndarray = filled[low:high], piece: np.ndarray = pieces[low:high]) -> None:
                part[...] = piece
                barrier.land(2 * len(piece))

            self.events.append(Event(("load", self.random.randrange(4)), land, [filled[low:high]]))

    def store(self, target: Descriptor, at: Sequence[int], source: Memory) -> Steps:
        yield
        if _meet(source.values, self.unfenced.get(self.running, ())):
            raise Fault("no fence between writing memory and copying it")

        def copy() -> None:
            parts = target.overlap(at)
            if parts is not None:
                target.tensor[parts[1]] = source.values.reshape(target.box)[parts[0]]
                target.written[parts[1]] += 1

        self.events.append(Event(("store", self.running), copy, [source.values]))

    def store_wait(self, pending: int) -> Steps:
        return self._wait("store", pending)

    # --- products ---

    def multiply(self, a: Memory, b: Memory, sums: Sums | Registers, is_async: bool) -> Steps:
        yield
        values = sums.values if isinstance(sums, Sums) else sums
        if self.fills(a.values) or self.fills(b.values):
            raise Fault("a slot read before its data have come")

        def add() -> None:
            values[...] = values + a.values @ b.values

        self.events.append(Event(("product", self.running), add, [a.values, b.values]))
        return Sums(values)

    def multiply_wait(self, pending: int, deps: Sequence[Any]) -> Steps:
        yield from self._wait("product", pending)
        return deps[0].values if pending == 0 else deps[0]


def _meet(values: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Whether some memory is in any of the others. Each is one run of bytes, of which numpy compares the ends."""
    return any(np.may_share_memory(values, other) for other in others)
