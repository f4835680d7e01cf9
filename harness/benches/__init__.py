"""Benches: the small real models that loaders load LoRA files into."""

from harness.benches.bench import Bench, bench_names, get_bench

__all__ = ["Bench", "bench_names", "get_bench"]
