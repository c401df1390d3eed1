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
from dataclasses import dataclass, field
from typing import Any

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


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes have come."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.arrivals = count

    def arrive(self, expected_bytes: int = 0) -> None:
        self.bytes += expected_bytes
        self.arrivals -= 1
        self._settle()

    def land(self, size: int) -> None:
        self.bytes -= size
        self._settle()

    def _settle(self) -> None:
        if self.arrivals < 0:
            raise Fault("more arrivals than a barrier's count")
        if self.arrivals == 0 and self.bytes == 0:
            self.phase += 1
            self.arrivals = self.count


@dataclass
class Barriers:
    """An array of them in shared memory."""

    each: list[Barrier]

    def index(self, i: int) -> Barrier:
        return self.each[i]


@dataclass(eq=False)
class Use:
    """Some bytes that are being read, or filled."""

    first: int
    last: int

    def meets(self, first: int, last: int) -> bool:
        return self.first < last and first < self.last


@dataclass(eq=False)
class Buffer:
    """One allocation, NaN until it is written, with what reads it and what fills it at the moment."""

    values: np.ndarray
    reads: list[Use] = field(default_factory=list)
    loads: list[Use] = field(default_factory=list)


class Memory:
    """A view of a buffer, rows after rows; `transposed` where its two axes have changed places."""

    layout = None

    def __init__(self, cta: Cta, buffer: Buffer, first: int, shape: Sequence[int], transposed: bool = False) -> None:
        self.cta, self.buffer, self.first, self.shape, self.transposed = cta, buffer, first, list(shape), transposed
        self.last = first + int(np.prod(self.shape))
        if first < 0 or self.last > len(buffer.values):
            raise Fault("a view beyond its memory")

    def index(self, i: int) -> Memory:
        if not 0 <= i < self.shape[0]:
            raise Fault(f"index {i} of {self.shape[0]}")
        size = (self.last - self.first) // self.shape[0]
        return Memory(self.cta, self.buffer, self.first + i * size, self.shape[1:])

    def permute(self, _: Any) -> Memory:
        return Memory(self.cta, self.buffer, self.first, self.shape, not self.transposed)

    def viewed(self, shape: Sequence[int]) -> Memory:
        return Memory(self.cta, self.buffer, self.first, shape)

    def values(self) -> np.ndarray:
        values = self.buffer.values[self.first : self.last].reshape(self.shape)
        return values.T if self.transposed else values

    def meets(self, uses: list[Use]) -> bool:
        return any(use.meets(self.first, self.last) for use in uses)

    def load(self, _: Any) -> Registers:
        if self.meets(self.buffer.loads):
            raise Fault("memory read before its data have come")
        return registers(self.values().copy())

    def store(self, values: np.ndarray) -> Steps:
        yield
        if self.meets(self.buffer.reads):
            raise Fault("memory rewritten while a copy still reads it")
        if self.meets(self.buffer.loads):
            raise Fault("memory written while a load fills it")
        self.buffer.values[self.first : self.last] = (values.T if self.transposed else values).reshape(-1)
        self.cta.unfenced.setdefault(self.cta.running, []).append((self.buffer, Use(self.first, self.last)))


@dataclass(eq=False)
class Descriptor:
    """A strided view of a tensor in global memory and the box in which it is copied. written: how often each value;
    loaded: how many values in all.
    """

    tensor: np.ndarray
    box: tuple[int, ...]
    written: np.ndarray
    loaded: int = 0
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
        self.events: list[tuple[tuple[str, Any], Callable[[], None]]] = []
        self.weights: dict[Any, float] = {}
        self.products: dict[str, int] = {}
        self.stores: dict[str, int] = {}
        # What warps have written and not yet shown to the hardware that copies.
        self.unfenced: dict[str, list[tuple[Buffer, Use]]] = {}

    # --- the scheduler ---

    def run(self, main: Steps) -> None:
        """To the end, or to a Fault."""
        self.tasks["main"] = main, None
        while self.tasks:
            self._step()
        while self.events:
            self.events.pop(self.random.randrange(len(self.events)))[1]()

    def _step(self) -> None:
        ready = [name for name, (_, condition) in self.tasks.items() if condition is None or condition()]
        queues = list(dict.fromkeys(queue for queue, _ in self.events))
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
        same = [i for i, (queue, _) in enumerate(self.events) if queue == chosen]
        in_order = chosen[0] == "product"
        self.events.pop(same[0] if in_order else self.random.choice(same))[1]()

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

    def until(self, condition: Condition) -> Steps:
        yield
        while not condition():
            yield condition

    def specialise(self, parts: Sequence[tuple[Callable[..., Steps], Sequence[Any]]]) -> Steps:
        yield
        names = [f"warps {i}" for i in range(len(parts))]
        for name, (function, arguments) in zip(names, parts, strict=True):
            self.tasks[name] = function(*arguments), None
        yield from self.until(lambda: not any(name in self.tasks for name in names))

    # --- shared memory ---

    def allocate(self, shape: Sequence[int]) -> Memory:
        size = int(np.prod(shape))
        return Memory(self, Buffer(np.full(size, np.nan)), 0, shape)

    def barriers(self, count: int) -> Barriers:
        return Barriers([Barrier() for _ in range(count)])

    def fence(self) -> None:
        self.unfenced[self.running] = []

    # --- copies ---

    def load(self, source: Descriptor, at: Sequence[int], barrier: Barrier, target: Memory) -> None:
        buffer, size = target.buffer, target.last - target.first
        if size != int(np.prod(source.box)):
            raise Fault(f"a box of {source.box} does not fill {target.shape}")
        if target.meets(buffer.reads):
            raise Fault("a slot overwritten while it is read")
        if target.meets(buffer.loads):
            raise Fault("two loads into one slot")
        values, parts = np.zeros(source.box), source.overlap(at)
        if parts is not None:
            values[parts[0]] = source.tensor[parts[1]]
            source.loaded += values[parts[0]].size
        flat = values.reshape(-1)
        cuts = sorted({0, size, *(self.random.randrange(size) for _ in range(self.random.randrange(3)))})
        for low, high in itertools.pairwise(cuts):
            use = Use(target.first + low, target.first + high)
            buffer.loads.append(use)

            def land(use: Use = use, piece: np.ndarray = flat[low:high]) -> None:
                buffer.values[use.first : use.last] = piece
                buffer.loads.remove(use)
                barrier.land(2 * len(piece))

            self.events.append((("load", self.random.randrange(4)), land))

    def store(self, target: Descriptor, at: Sequence[int], source: Memory) -> None:
        who, use = self.running, Use(source.first, source.last)
        written = (each for buffer, each in self.unfenced.get(who, ()) if buffer is source.buffer)
        if any(each.meets(use.first, use.last) for each in written):
            raise Fault("no fence between writing memory and copying it")
        source.buffer.reads.append(use)
        self.stores[who] = self.stores.get(who, 0) + 1

        def copy() -> None:
            parts = target.overlap(at)
            if parts is not None:
                target.tensor[parts[1]] = source.values().reshape(target.box)[parts[0]]
                target.written[parts[1]] += 1
            source.buffer.reads.remove(use)
            self.stores[who] -= 1

        self.events.append((("store", who), copy))

    # --- products ---

    def multiply(self, a: Memory, b: Memory, sums: Sums | Registers) -> Sums:
        values = sums.values if isinstance(sums, Sums) else sums
        uses = []
        for operand in (a, b):
            if operand.meets(operand.buffer.loads):
                raise Fault("a slot read before its data have come")
            uses.append((operand.buffer, Use(operand.first, operand.last)))
            operand.buffer.reads.append(uses[-1][1])
        who = self.running
        self.products[who] = self.products.get(who, 0) + 1

        def add() -> None:
            values[...] = values + a.values() @ b.values()
            for buffer, use in uses:
                buffer.reads.remove(use)
            self.products[who] -= 1

        self.events.append((("product", who), add))
        return Sums(values)
