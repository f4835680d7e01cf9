"""Open any saved diffusers pipeline, and know how to ask it for pictures: prompts, size, steps, the denoiser's name."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from harness.errors import UserError, one_line
from harness.isolation.device import cuda_devices
from harness.isolation.gpus import leave_the_driver_alone
from harness.loaders.live import quiet
from harness.outputs import text_of

Offload = Literal["none", "model", "sequential"]
TABLE = "prompts.safetensors"
PROMPTS = (
    "a red apple on a wooden table", "a portrait of an old fisherman, soft light",
    "a small house by a lake in autumn", "a black cat sitting on a blue chair",
)  # fmt: skip


@dataclass
class OpenPipeline:
    """A diffusers pipeline ready to draw, on the CPU until it does.

    `base` is the denoiser as it was saved, kept on the CPU and never changed; loaders get fresh copies of it.
    `words` maps a word to its row when the pipeline has a word table instead of a text encoder.
    """

    pipe: Any
    folder: str
    denoiser: str
    base: nn.Module
    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"
    words: Mapping[str, Tensor] | None = None
    prompts: tuple[str, ...] = PROMPTS
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the folder."""
        return Path(self.folder).name

    def fresh(self) -> nn.Module:
        """Return an untouched copy of the denoiser on the CPU."""
        return copy.deepcopy(self.base)

    def install(self, denoiser: nn.Module) -> nn.Module:
        """Make `denoiser` the one that draws, on the right device; return it."""
        if self.offload != "none":
            self.pipe.remove_all_hooks()
        setattr(self.pipe, self.denoiser, denoiser.eval())
        if self.offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:  # only now: a process that is forked later could not use a GPU any more
            (denoiser if self.device.type == "cpu" else self.pipe).to(self.device)
        return denoiser

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the arguments that carry `prompts`: the strings, or rows of the word table `[n, words, width]`.

        Raises:
            UserError: a prompt has a word that the table does not know, or none.
        """
        if self.words is None:
            return {"prompt": list(prompts)}
        rows = [torch.stack([self._row(word, prompt) for word in prompt.split() or [""]]) for prompt in prompts]
        masks = [torch.ones(len(words), dtype=torch.long) for words in rows]
        return {
            "prompt_embeds": pad_sequence(rows, batch_first=True).to(self.device, self.dtype),
            "prompt_embeds_mask": pad_sequence(masks, batch_first=True).to(self.device),
        }

    def _row(self, word: str, prompt: str) -> Tensor:
        assert self.words is not None
        if word not in self.words:
            raise UserError(f"prompt {prompt!r}: this pipeline knows only the words {', '.join(self.words)}")
        return self.words[word]


def open_pipeline(
    folder: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    offload: Offload = "none",
    allow_download: bool = False,
    size: int | None = None,
    steps: int | None = None,
) -> OpenPipeline:
    """Open the saved pipeline in `folder`; a hub id only with `allow_download`.

    `dtype` defaults to float32 on the CPU and bfloat16 elsewhere; `size` is the edge in pixels, `steps` the number of
    denoising steps (default 20, or what the pipeline's word table says). Only safetensors weights are read.

    Raises:
        UserError: no pipeline there, a component is missing, or nothing in it denoises.
    """
    if not allow_download or Path(folder).is_dir():
        _check_folder(Path(folder))
    where = _device(device)
    dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    pipe = _load(folder, dtype, allow_download)
    denoiser = next(
        (name for name in ("transformer", "unet") if isinstance(getattr(pipe, name, None), nn.Module)), None
    )
    if denoiser is None:
        raise UserError(
            f"{folder}: {type(pipe).__name__} has neither a transformer nor a unet that a LoRA could change"
        )
    pipe.set_progress_bar_config(disable=True)
    base = getattr(pipe, denoiser).requires_grad_(False).eval()
    opened = OpenPipeline(
        pipe, str(Path(folder).resolve() if Path(folder).is_dir() else folder), denoiser, base, where, dtype, offload
    )
    opened.call = _call_arguments(pipe, size, steps)
    _read_table(Path(folder), opened, steps)
    if size is None and opened.words is None:
        _default_size(opened)
    return opened


def read_prompts(path: Path | str) -> tuple[str, ...]:
    """Read one prompt per line; empty lines and lines that begin with # are left out.

    Raises:
        UserError: the file cannot be read or holds no prompt.
    """
    try:
        lines = text_of(Path(path)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: prompts cannot be read: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise UserError(f"{path}: the prompts file holds no prompt; write one per line")
    return prompts


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a hub id is only fetched when downloads are allowed")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder}: no model_index.json, so this is not a saved diffusers pipeline (save_pretrained writes one)"
        )
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index}: not JSON: {error}") from None
    for name, value in components.items():
        wanted = (
            isinstance(value, list)
            and value
            and value[0] is not None
            and name not in ("safety_checker", "feature_extractor")
        )
        if wanted and not any((folder / name).glob("*")):
            raise UserError(
                f"{folder}: component {name!r} ({value[1]}) is missing: model_index.json names it, it has no folder"
            )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name!r}: {one_line(error)}") from None
    if device.type == "cuda":
        leave_the_driver_alone()
        if (count := len(cuda_devices())) <= (device.index or 0):
            raise UserError(f"device={name!r}: torch {torch.__version__} sees {count or 'no'} CUDA device(s)")
    return device


def _load(folder: Path | str, dtype: torch.dtype, allow_download: bool) -> Any:
    from diffusers import DiffusionPipeline

    with quiet("diffusers", "transformers"):
        try:
            return DiffusionPipeline.from_pretrained(
                str(folder),
                **_dtype_argument(dtype),
                **_absent(Path(folder)),
                local_files_only=not allow_download,
                use_safetensors=True,
            )
        except Exception as error:
            raise UserError(f"{folder}: diffusers cannot open this pipeline: {one_line(error)}") from error


def _absent(folder: Path) -> dict[str, Any]:
    """Return the components to leave out: those saved as null, and the checker that would paint pictures black."""
    index = folder / "model_index.json"
    saved = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    absent: dict[str, Any] = {name: None for name, value in saved.items() if value == [None, None]}
    return absent | ({"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in saved else {})


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    from diffusers import DiffusionPipeline

    renamed = "_resolve_dtype" in vars(
        sys.modules[DiffusionPipeline.__module__]
    )  # the old name warns since it was renamed
    return {"dtype" if renamed else "torch_dtype": dtype}


def _call_arguments(pipe: Any, size: int | None, steps: int | None) -> dict[str, Any]:
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {"num_inference_steps": steps or 20, "true_cfg_scale": 1.0, "num_frames": 1}
    wanted |= {"height": size, "width": size} if size else {}
    return {name: value for name, value in wanted.items() if name in accepted}


def _default_size(opened: OpenPipeline) -> None:
    size = getattr(opened.base.config, "sample_size", None)
    if isinstance(size, int) and hasattr(opened.pipe, "vae_scale_factor") and opened.denoiser == "unet":
        edge = size * opened.pipe.vae_scale_factor
        opened.call |= {"height": edge, "width": edge}


def _read_table(folder: Path, opened: OpenPipeline, steps: int | None) -> None:
    if not (folder / TABLE).is_file() or getattr(opened.pipe, "text_encoder", None) is not None:
        return
    from safetensors import safe_open

    with safe_open(folder / TABLE, "pt") as file:
        facts, rows = file.metadata(), file.get_tensor("words").float()
    opened.words = dict(zip(json.loads(facts["words"]), rows, strict=True))
    every = json.loads(facts["prompts"])
    opened.prompts = tuple(every[i] for i in range(0, len(every), 23))[:4]
    edge = int(facts["size"])
    opened.call = {"height": edge, "width": edge} | opened.call | {"num_inference_steps": steps or int(facts["steps"])}
