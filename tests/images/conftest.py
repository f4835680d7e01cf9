from __future__ import annotations

from pathlib import Path

import pytest

from harness.images import OpenPipeline, base_pipeline, lora_file, open_pipeline


@pytest.fixture(scope="session")
def tiny() -> OpenPipeline:
    """The tiny trained pipeline; the first LoRA that names merged QKV gives it that form."""
    return open_pipeline(base_pipeline())


@pytest.fixture(scope="session")
def r8_a16() -> Path:
    """Rank 8, alpha 16, on merged QKV."""
    return lora_file("r8_a16", "peft")
