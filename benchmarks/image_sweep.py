"""How fast is a sweep? Batched strengths against diffusers' `set_adapters` loop, the probe against sampling.

    python benchmarks/image_sweep.py [--device cuda --dtype bfloat16] [--repeats 2]

Each ratio compares two ways in one process, interleaved, best of `--repeats`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.tools import judged
from harness.images import ALPHAS, base_pipeline, lora_file, open_pipeline, run_sweep
from harness.images import studio as studios
from harness.images.recorder import Recorder, drawing
from harness.images.sampling import Pair, determinism, runtime_scaling
from harness.images.studio import Studio
from harness.isolation.subject import Here
from harness.loaders.protocol import Subject
from harness.loaders.registry import resolve

COUNTS = (1, 8)


def best(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest time of each way in seconds, all ways taking turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def studio_of(count: int, device: str, dtype: torch.dtype, *, quick: bool = False) -> Studio:
    opened = open_pipeline(base_pipeline(), device=device, dtype=dtype)
    pairs = [Pair(opened.prompts[i % len(opened.prompts)], i) for i in range(count)]
    studio = Studio(opened, lora_file("r8_a16", "diffusers"), pairs, quick=quick)
    studio._drawn = {}  # references drawn by another measurement would be free
    return studio


def drawn(count: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Time nine strengths drawn in shared batches and one after the other; the LoRA is loaded once for both."""
    studio = studio_of(count, device, dtype)
    model = studio.load(resolve("diffusers"), 1.0)
    trained = runtime_scaling(model)
    assert trained is not None
    scalings = [{name: {a: s * v for a, v in layer.items()} for name, layer in trained.items()} for s in ALPHAS]

    def loop() -> None:
        for strength in ALPHAS:
            model.set_adapters(list(next(iter(trained.values()))), [strength])
            studio.sampler.images(model)

    def shared() -> None:
        if studio.shares_batches:
            studio.sampler.images_at(model, scalings)
        else:
            loop()

    return best({"loop": loop, "batched": shared}, repeats)


def probing(device: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Time the pictures and the one-call answers of one loaded model, 8 pairs."""
    studio = studio_of(8, device, dtype)
    model = studio.load(resolve("diffusers"), 1.0)
    calls = studio.sampler.record(studio.opened.fresh())
    ways = {"sampling": lambda: studio.sampler.images(model), "probe": lambda: studio.sampler.replay(model, calls)}
    return best(ways, repeats)


class Counted:
    """Counts the calls of a pipeline's denoiser, and the pictures in them, while it is entered."""

    def __init__(self, denoiser: type[torch.nn.Module]) -> None:
        self._class, self._forward = denoiser, denoiser.forward
        self.calls = self.pictures = 0

    def __enter__(self) -> Counted:
        def forward(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.pictures += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            return self._forward(model, *args, **kwargs)

        self._class.forward = forward
        return self

    def __exit__(self, *error: object) -> None:
        self._class.forward = self._forward


def in_turns(device: str, dtype: torch.dtype, repeats: int) -> list[str]:
    """Time whole sweeps with all pictures and in turns, of a right loader and a wrong one; nothing is drawn before."""
    rows = ["| a whole sweep, 8 pictures | all of them | in turns | share | of the pictures | of the calls |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    opened = open_pipeline(base_pipeline(), device=device, dtype=dtype)
    right = resolve("peft")
    twice = replace(right, load=lambda model, lora, *, strength=1.0: right.load(model, lora, strength=2 * strength))
    for name, loader in (("as trained", right), ("twice too strong", twice)):
        counts: dict[bool, Counted] = {}

        def sweep(sequential: bool, loader: Subject = loader, counts: dict[bool, Counted] = counts) -> None:
            studios._SHARED.clear()
            way = {"pipeline": opened, "lora": lora_file("r8_a16", "peft"), "sequential": sequential}
            with Counted(type(opened.base)) as counts[sequential]:
                run_sweep(loader, progress=False, workers=0, **way)

        took = best({"all": partial(sweep, False), "in turns": partial(sweep, True)}, repeats)
        every, few = counts[False], counts[True]
        share = judged(f"{took['in turns'] / took['all']:.2f}", met=took["in turns"] <= took["all"] / 3)
        seen = f"{few.pictures / every.pictures:.2f} | {few.calls / every.calls:.2f}"
        rows.append(f"| {name} | {took['all']:.1f} s | {took['in turns']:.1f} s | {share} | {seen} |")
    limit = (
        "The last two say how often the denoiser drew a step of a picture, and how often it was called for several at "
        "once: where a call costs its pictures, as in a large model, the share is the first of them; here, where a "
        "call of few costs about as much, it is the second."
    )
    return [*rows, "", limit, ""]


def share_of_harness(device: str, dtype: torch.dtype) -> float:
    """Return the share of a whole sweep that is neither drawing nor the loader's own time."""
    studio = studio_of(8, device, dtype)
    inside = 0.0

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.perf_counter() - began

        return call

    studio.sampler.images = timed(studio.sampler.images)  # type: ignore[method-assign,assignment]
    studio.sampler.images_at = timed(studio.sampler.images_at)  # type: ignore[method-assign,assignment]
    studio.load = timed(studio.load)  # type: ignore[method-assign,assignment]
    began = time.perf_counter()
    asked = Here(drawing([studio], resolve("diffusers")))
    Recorder(studio, resolve("diffusers"), None, lambda row: None, asked).run(ALPHAS, began)
    return 1 - inside / (time.perf_counter() - began)


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one picture, one repeat")
    options = parser.parse_args(argv)
    counts, options.repeats = (COUNTS[:1], 1) if options.quick else (COUNTS, options.repeats)
    dtype = getattr(torch, options.dtype)
    lines = ["| nine strengths | set_adapters loop | shared batches | ratio |", "| --- | --- | --- | --- |"]
    with determinism():
        for count in counts:
            print(f"nine strengths of {count} pictures ...", file=sys.stderr, flush=True)
            seconds = drawn(count, options.device, dtype, options.repeats)
            ratio = seconds["loop"] / seconds["batched"]
            lines.append(f"| {count} pictures | {seconds['loop']:.2f} s | {seconds['batched']:.2f} s | {ratio:.2f} |")
        print("whole sweeps ...", file=sys.stderr, flush=True)
        turns = in_turns(options.device, dtype, options.repeats)
        probe = probing(options.device, dtype, options.repeats)
        share = share_of_harness(options.device, dtype)
    lines += [
        "",
        "Eight pictures already fill a core of a CPU with arithmetic: larger batches gain at few pictures only, and "
        "there is no aim for eight.",
        "",
        *turns,
        f"Probe: 8 pairs in {probe['probe']:.3f} s against {probe['sampling']:.3f} s of sampling, "
        f"{probe['sampling'] / probe['probe']:.1f} times cheaper.",
        f"Harness time outside drawing and loading: {100 * share:.1f} % of a sweep of nine strengths, 8 pictures each.",
        "",
        f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.machine()}.",
    ]
    return ["## How fast a sweep is", "", *lines]


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
