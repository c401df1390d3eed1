"""The README's performance table is what the committed results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from fastunet.benchmarks import results
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.results import BEGIN, END

from fastunet.checks import DataError

ROOT = Path(__file__).parents[2]
RATIO = {"ratio": 1.526, "p10": 1.5, "p90": 1.57}
RESULT = {
    "summary": {"inference": {"eager": RATIO, "compiled": {"ratio": 0.9, "p10": 0.85, "p90": 0.95}}, "training": {}},
    "environment": {"device": "a device", "torch": "2.13.0", "commit": "abc"},
    "settings": {"size": 256, "batch": 1, "threads": 2, "rounds": 15, "features": [2, 4], "dtype": "float16"},
    "rows": [],
}


def write(root: Path, name: str, value: object) -> Path:
    path = root / "benchmarks/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return root / "benchmarks/results"


def test_the_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    assert results.replace_between(text, results.generate(ROOT / "benchmarks/results", results.README_FILES)) == text, (
        "run `make perf-table`"
    )


def test_figures_come_from_the_files(tmp_path: Path) -> None:
    training = copy.deepcopy(RESULT)
    training["summary"]["training"] = {"eager": {"ratio": 2.0, "p10": 1.9, "p90": 2.1}}
    write(tmp_path, "cpu/accuracy_steps_400.json", {"plain": {}})
    write(tmp_path, "cpu/unet_cpu.json", RESULT)
    text = results.generate(write(tmp_path, "a_gpu/gpu_report.json", training))
    gpu, cpu = text.split("benchmarks/results/cpu/unet_cpu.json")
    assert "| eager | 1.53 (1.50 to 1.57) | 2.00 (1.90 to 2.10) |" in gpu
    assert "| eager | 1.53 (1.50 to 1.57) |\n" in cpu
    assert "| compiled | 0.90 (0.85 to 0.95) |" in cpu, "what lost is shown too"
    assert "benchmarks/results/a_gpu/gpu_report.json" in gpu
    assert "accuracy" not in text
    assert "not measured" not in text
    assert "a device, torch 2.13.0; U-Net 2-4, float16, images of 256x256, batches of 1, 2 threads" in text


def test_other_peoples_models(tmp_path: Path) -> None:
    settings = {"task": "inference", "size": 256, "batch": 1, "width": 32, "rounds": 15, "threads": 2}
    row = {"name": "a net", "found": 5, "replaced": 3, "left": {"too large: why": 2}}
    row["samples_ms"] = {"fastunet": [2.0, 2.0], "eager": [2.0, 3.0]}
    result = {"environment": RESULT["environment"], "settings": settings, "rows": [row]}
    text = results.generate(write(tmp_path, "cpu/drop_in_inference.json", result))
    failed = "inductor: failed | inductor channels_last and fastunet.compile: failed"
    assert f"| a net | 5 | 3 | 2: too large | 1.25 (1.05 to 1.45) | {failed} |" in text
    assert "32 channels in the first level, images of 256x256" in text
    with pytest.raises(DataError, match=r"drop_in_inference\.json"):
        results.generate(write(tmp_path, "cpu/drop_in_inference.json", {**result, "rows": [{}]}))


def test_without_results_it_says_so(tmp_path: Path) -> None:
    text = results.generate(write(tmp_path, "cpu/accuracy.json", {"plain": {}}))
    assert text.count("not measured") == 2
    assert "|" not in text


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(tmp_path, "cpu/unet_cpu.json", RESULT)
    assert main(["perf-table", "--root", str(tmp_path)]) == 0
    once = (tmp_path / "README.md").read_text()
    assert once.startswith(f"before\n{BEGIN}\n\n")
    assert once.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in once
    assert main(["perf-table", "--root", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == once


@pytest.mark.parametrize("text", ["nothing", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_a_readme_without_its_markers_stays_as_it_is(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(SystemExit):
        main(["perf-table", "--root", str(tmp_path)])
    assert "expected one line" in capsys.readouterr().err
    (readme,) = tmp_path.iterdir()
    assert readme.read_text() == text
