"""Pictures: a loader at many strengths, drawn beside the reference, and what the pictures alone say about it."""

from __future__ import annotations

from harness.images.factor import Estimate
from harness.images.fixture import base_pipeline, has_lora_for, lora_file, lora_for
from harness.images.pipelines import OpenPipeline, open_pipeline, read_prompts
from harness.images.recorder import SweepResult
from harness.images.sweep import ALPHAS, SweepOptions, run_sweep
from harness.images.verdict import Judgement, StrengthResult, judge

__all__ = [
    "ALPHAS",
    "Estimate",
    "Judgement",
    "OpenPipeline",
    "StrengthResult",
    "SweepOptions",
    "SweepResult",
    "base_pipeline",
    "has_lora_for",
    "judge",
    "lora_file",
    "lora_for",
    "open_pipeline",
    "read_prompts",
    "run_sweep",
]
