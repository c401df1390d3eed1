"""What a person with a GPU runs: are the kernels right there, and how fast are they beside cuDNN and torch.compile?

Writes into DIR, anew after every step: gpu_report.json (rows, environment, commit, summary), gpu_report.md,
roofline.png, and the table of measured configurations, <gpu>.json, which is used once it is in kernels/tuned/. It ends
within the given minutes: what there was no time for is named, and measured by the next call with the same DIR. In
this order: each family of kernels on small images, in processes of their own; every op in bfloat16 against float64;
the GPU's peak rates; the layers of UNet(3, 2), forward; the net's inference and training step; the layers, backward;
the nets beside torch.compile; every op in the other formats; the layers beside torch.compile; the search for
configurations (the command tune has more time for it). The first implementation is ours: the Triton kernels,
where they run. `--device cpu` runs the same steps on a CPU, to see that they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from fastunet.kernels import autotune, gpu, self_test
from fastunet.kernels.conv3x3 import config, config_hopper

from fastunet import dispatch
from fastunet.checks import ConfigError
from fastunet.files import write_json, written_whole
from fastunet.testing.families import FP8

from . import tune
from .cases import DTYPE, Pass, Settings, add_settings, settings_of
from .gpu_steps import all_steps, run_steps
from .harness.worker import RESERVE, Budget
from .results import Row, times_ms
from .roofline import PeakRates
from .tables import render, report_of, summarise


def add_bounds(rows: Sequence[Row]) -> None:
    """To the rows of forward times, where the peak rates were measured: "bound_ms", and its share of our time,
    "of_bound".

    The rate of matmul is the burst's: no share is flattered by a GPU that was hot when the rate was measured.
    """
    peaks = peak_rates_of(rows)
    if peaks is None:
        return
    bounds = {}
    for row in rows:
        if row["kind"] == "layer" and row["variant"] != "backward":
            row["bound_ms"] = bounds[row["name"]] = 1e3 * peaks.seconds(Pass(row["flops"], row["bytes"]))
    for row in rows:
        if row["kind"] == "net" and row["name"] == "inference":
            row["bound_ms"] = sum(bounds.values())
        if "bound_ms" in row and (times := times_ms(row)):
            row["of_bound"] = row["bound_ms"] / next(iter(times.values())).median


def peak_rates_of(rows: Sequence[Row]) -> PeakRates | None:
    """The measured peak rates, if there are any yet."""
    for row in rows:
        if row["kind"] == "peak rates" and row["status"] == "ok":
            return PeakRates(1e12 * row["matmul"]["burst_tflops"], 1e9 * row["copy"]["gb_per_s"])
    return None


def draw_roofline(out: Path, report: Row) -> str:
    """Write roofline.png; why not, where it cannot be."""
    peaks = peak_rates_of(report["rows"])
    rows = [row for row in report["rows"] if row["kind"] == "layer" and row["variant"] == "forward" and times_ms(row)]
    if peaks is None or not rows:
        return "no peak rates, or no layer, were measured"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    from .charts import plot_roofline

    plot_roofline(rows, peaks, out / "roofline.png")
    return ""


def check_families(settings: Settings, budget: Budget) -> list[Row]:
    """Return a row for each family of kernels: whether it is right on small images, in a process that may crash."""
    if settings.device != "cuda" or dispatch.triton_unsupported(settings.torch_device, DTYPE) is not None:
        return []
    target, families = gpu.target(settings.torch_device), [*dispatch.TRITON_OPS]
    families += [config_hopper.FAMILY] if config_hopper.missing(DTYPE, target) is None else []
    families += [FP8] if config.has_fp8(target) else []
    found = self_test.check(families, "bfloat16", settings.torch_device, min(self_test.TIMEOUT, budget.left()))
    return [
        {"kind": "smoke", "name": family, "variant": "bfloat16", "reason": failed}
        | {"status": "failed" if failed else "ok"}
        for family, failed in found.items()
    ]


def earlier_rows(file: Path, report: Row) -> list[Row]:
    """Return the rows of a report that was begun before, but those that had no time; none if there is no file.

    Raises ConfigError where it is of another machine, commit, or other settings.
    """
    if not file.is_file():
        return []
    found, wanted = json.loads(file.read_text()), json.loads(json.dumps(report))
    for part in ("environment", "settings"):
        changed = [name for name, value in wanted[part].items() if found[part].get(name) != value]
        if changed := [name for name in changed if name != "temperature"]:
            was, now = ({name: values[part].get(name) for name in changed} for values in (found, wanted))
            raise ConfigError(f"{file}: expected a report of {now}, got one of {was}: choose another folder")
    return [row for row in found["rows"] if row["status"] not in ("skipped", "timed out")]


def make_report(settings: Settings, out: Path, minutes: float) -> Row:
    """Measure and write DIR's files; returns what the JSON holds.

    What DIR's report has already is not measured again. Raises ConfigError where DIR's report is another.
    """
    budget = Budget(60 * minutes - RESERVE)
    out.mkdir(parents=True, exist_ok=True)
    report = report_of(settings, [])
    earlier = earlier_rows(out / "gpu_report.json", report)
    smoke = [row for row in earlier if row["kind"] == "smoke"] or check_families(settings, budget)

    def save(rows: list[Row]) -> None:
        rows = smoke + rows
        add_bounds(rows)
        report.update(summary=summarise(rows), rows=rows)
        write_json(out / "gpu_report.json", report)
        with written_whole(out / "gpu_report.md") as temporary:
            temporary.write_text(render(report))

    save([])
    rows = run_steps(settings, all_steps(settings), budget, save, earlier)
    report["roofline"] = draw_roofline(out, report)
    save(rows)
    if dispatch.triton_unsupported(settings.torch_device, DTYPE) is None:
        path = autotune.table_path(gpu.target(settings.torch_device).name)
        report["tuned"] = tune.measure_table(settings, out / path.name, budget)
        save(rows)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the report has ended")
    add_settings(parser, Settings(), "device", "size", "batch")


def run(options: argparse.Namespace) -> int:
    """Measure and write; return 0 if something was measured and nothing was found wrong, else 1."""
    settings = settings_of(options)
    if options.minutes <= 0:
        raise ConfigError(f"expected --minutes above 0, got {options.minutes}")
    report = make_report(settings, options.out, options.minutes)
    print(f"{options.out / 'gpu_report.md'}\n{report['summary']}")
    print(f"To use the configurations that were measured, if any: cp {options.out}/<gpu>.json {autotune.TUNED}")
    wrong = [row for row in report["rows"] if row["status"] not in ("ok", "skipped")]
    is_empty = all(row["status"] == "skipped" for row in report["rows"])
    return 1 if wrong or is_empty else 0
