"""Benches: the small real models that loaders load LoRA files into."""

from harness.benches.bench import Bench
from harness.benches.layer import Layer, View
from harness.benches.registry import add_bench, bench_names, get_bench, more_benches, own_benches

__all__ = ["Bench", "Layer", "View", "add_bench", "bench_names", "get_bench", "more_benches", "own_benches"]
