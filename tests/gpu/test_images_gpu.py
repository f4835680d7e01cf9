"""The sweep on CUDA: every installed loader in half precision, and float32 against the CPU."""

from __future__ import annotations

import os
import time

import pytest
import torch

from harness.images import base_pipeline, lora_file, open_pipeline, run_sweep
from harness.images.fixture import has_lora_for
from harness.images.reference import Reference, open_lora
from harness.images.sampling import Pair, Sampler, determinism
from harness.images.studio import Studio
from harness.loaders.registry import installed, resolve

pytestmark = [pytest.mark.gpu, pytest.mark.images, pytest.mark.usefixtures("cuda")]
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LOADERS = [loader.name for loader in installed() if loader.available and has_lora_for(resolve(loader.name).cells)]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", sorted(HALF))
@pytest.mark.parametrize("name", LOADERS)
def test_every_installed_loader_looks_as_trained_in_half_precision(name: str, dtype: str, record_property):
    found = run_sweep(resolve(name), alphas=ALPHAS, device="cuda", dtype=HALF[dtype], progress=False)
    record_property("seconds", found.verdicts[0].seconds)
    record_property("peak_memory", max(row["peak_memory"] for row in found.records))
    assert found.verdicts[0].outcome == "passed", found.verdicts[0].text()
    assert found.verdicts[0].estimated_factor == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", *sorted(HALF)])
def test_a_wrong_factor_is_found_on_the_gpu(dtype: str):
    right = resolve("peft")

    def load(model, lora, *, strength=1.0):
        return right.load(model, lora, strength=1.25 * strength)

    found = run_sweep(
        resolve(load), alphas=(0, 1), device="cuda", dtype=getattr(torch, dtype), lora=_lora(), progress=False
    )
    assert found.verdicts[0].code == "LH602"
    assert found.verdicts[0].estimated_factor == pytest.approx(1.25, rel=0.1)


def test_a_loader_that_ends_its_process_is_an_errored_verdict():
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test of this process opened CUDA, so that loaders run here")

    def load(model, lora, *, strength=1.0):
        os._exit(0)

    found = run_sweep(resolve(load), alphas=(0, 1), device="cuda", lora=_lora(), progress=False)
    assert (found.verdicts[0].outcome, found.verdicts[0].code) == ("errored", "LH901")


def test_float32_on_the_gpu_draws_what_the_cpu_draws():
    pairs = [Pair("red circle on dark", 0), Pair("cyan triangle on dusk", 1), Pair("green cross on lake", 2)]
    pictures = []
    for device in ("cpu", "cuda"):
        opened = open_pipeline(base_pipeline(), device=device, dtype=torch.float32)
        reference = Reference(opened, open_lora(_lora(), opened))
        with determinism():
            pictures.append(Sampler(opened, pairs).images(reference.at(1.0)))
    torch.testing.assert_close(*pictures, atol=5e-3, rtol=0)


def test_seconds_and_memory_of_nine_strengths_batched_and_in_a_loop(record_property):
    opened = open_pipeline(base_pipeline(), device="cuda", dtype=torch.bfloat16)
    pairs = [Pair(prompt, seed) for prompt in opened.prompts for seed in (0, 1)]
    studio = Studio(opened, lora_file("r8_a16", "diffusers"), pairs)
    for label, subject in (("batched", "diffusers"), ("loop", "diffusers-fused")):
        list(studio.candidates(resolve(subject), ALPHAS[:2]))  # the first kernels are compiled here
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        drawn = [images for _, images, _ in studio.candidates(resolve(subject), ALPHAS)]
        record_property(f"{label}_seconds", round(time.perf_counter() - began, 3))
        record_property(f"{label}_peak_memory", torch.cuda.max_memory_allocated())
        assert len(drawn) == len(ALPHAS)
        assert all(images.isfinite().all() for images in drawn)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_draws_the_same_pictures(offload: str):
    pairs = [Pair("red circle on dark", 0)]
    plain = open_pipeline(base_pipeline(), device="cuda", dtype=torch.float32)
    moved = open_pipeline(base_pipeline(), device="cuda", dtype=torch.float32, offload=offload)
    torch.testing.assert_close(
        Sampler(plain, pairs).images(plain.fresh()), Sampler(moved, pairs).images(moved.fresh()), atol=1e-3, rtol=0
    )


def _lora():
    return lora_file("r8_a16", "peft")
