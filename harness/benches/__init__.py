"""Benches: the small real models that loaders load LoRA files into."""

from harness.benches.bench import Bench, bench_names, get_bench
from harness.benches.layer import Layer, View

__all__ = ["Bench", "Layer", "View", "bench_names", "get_bench"]
