"""torch.compile(model, backend="fastunet"): fastunet's ops in the U-Nets that people already have.

Dynamo hands over a graph of torch functions. What in it is exactly one of the ops, and would run on something else than
ATen, is replaced (`patterns`, `rewriting`); the rest goes on to another backend of torch.compile, inductor by default.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fastunet.ops  # noqa: F401  (registers the ops)
from fastunet.checks import ConfigError
from fastunet.compiler import patterns, rewriting
from fastunet.compiler.patterns import Pattern
from fastunet.torch_private import has_cpp_compiler, options_of_mode, run_backend

FALLBACKS = ("inductor", "aot_eager", "eager")


def compile(model: nn.Module, **kwargs: Any) -> Any:
    """Call torch.compile(model, backend="fastunet", **kwargs), after bringing the model's 4-D weights into
    channels_last.

    The parameters stay the same objects, so an optimizer made before keeps working; only their strides change.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return torch.compile(model, backend="fastunet", **kwargs)


def fastunet_backend(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Return the backend, by the interface of torch.compile's backends; found through the entry point "fastunet".

    options: "fallback", which backend gets what is left: "inductor" (default; "eager" where there is no C++ compiler),
    "aot_eager" or "eager"; "force": True replaces every pattern that is exactly one of the ops, also where the op would
    run on ATen, for tests; any others, like mode, are inductor's. Raises ConfigError on others with another fallback.
    """
    rest = dict(options or {})
    fallback, force = rest.pop("fallback", None), rest.pop("force", False)
    if fallback not in (None, *FALLBACKS):
        raise ConfigError(f"option 'fallback': expected one of {', '.join(FALLBACKS)}, got {fallback!r}")
    if not isinstance(force, bool):
        raise ConfigError(f"option 'force': expected True or False, got {force!r}")
    if fallback in ("eager", "aot_eager") and rest:
        raise ConfigError(f"options {', '.join(rest)}: expected the fallback 'inductor' for them, got {fallback!r}")
    replace_patterns(graph_module, force=force)
    fallback = fallback or default_fallback()
    if fallback != "inductor":
        return run_backend(fallback, graph_module, example_inputs)
    for inner in graphs_of(graph_module):
        rewriting.replace_replicate_pads(inner)
        rewriting.keep_interpolations(inner)
    settings = {**(options_of_mode(mode) if mode not in (None, "default") else {}), **rest}
    return run_backend(fallback, graph_module, example_inputs, config_patches=settings or None)


def graphs_of(graph_module: GraphModule) -> list[GraphModule]:
    """Return the graphs within a graph (checkpointed regions, branches), and at last itself."""
    inner = (child for child in graph_module.children() if isinstance(child, GraphModule))
    return [*(graph for child in inner for graph in graphs_of(child)), graph_module]


def find_patterns(graph_module: GraphModule, **options: Any) -> list[tuple[GraphModule, list[Pattern]]]:
    """Return patterns.find of a graph and of those within it, by graph."""
    return [
        (graph, patterns.find(graph, is_inner=graph is not graph_module, **options))
        for graph in graphs_of(graph_module)
    ]


def replace_patterns(graph_module: GraphModule, *, force: bool = False) -> list[Pattern]:
    """Put the ops into a graph, in the place of the patterns to be replaced; all that were found."""
    everything = []
    for inner, found in find_patterns(graph_module, force=force):
        if replaced := [pattern for pattern in found if pattern.is_replaced]:
            rewriting.replace(inner, replaced)  # A graph in which nothing gains stays as it came.
        everything += found
    return everything


@cache
def default_fallback() -> str:
    """Return what gets the rest where no fallback is asked for: "inductor", or "eager" where that cannot work."""
    if not has_cpp_compiler():
        warnings.warn(
            "fastunet: no C++ compiler was found (CXX names one), which torch.compile's inductor needs: "
            "what fastunet does not replace runs in eager mode",
            stacklevel=2,
        )
        return "eager"
    return "inductor"
