"""Some hundred requests at once, with a slow caller and a broken one: ``benchmarks/serve.py`` in small."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
def test_nothing_is_lost_or_mixed_up_and_memory_stays(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("serve_benchmark", BENCHMARKS / "serve.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_benchmark", benchmark)
    spec.loader.exec_module(benchmark)
    with benchmark.Served("known") as served:  # whose exit code has to be 0
        row = asyncio.run(benchmark.stress(served, 400, 16))
    assert row["answered"] == 400
    assert row["lost"] == 0
    assert row["mib_at_the_end"] - row["mib_after_a_tenth"] < 32
