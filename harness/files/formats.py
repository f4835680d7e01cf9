"""The format table: one row per format, in the order in which they are recognised (most specific first).

A row is what differs in the grammar of prefixes, in the spelling of the halves or in the home of alpha. What differs
only in the words of a module path, or in the tool that wrote it, is a dialect of a row. A format that spells module
paths in a way of its own has functions here that read and write such paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from harness.files.format import MLX_WEIGHTS_NAME, Format, Naming, Source, unwritten
from harness.files.gguf_file import GgufFile

_COMPONENTS = (
    "transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "connectors",
    "prior", "controlnet", "conditional_transformer", "text_encoder_4", "vae", "clip_l", "clip_g", "t5", "t5xxl",
)  # fmt: skip
_NORM = re.compile(r"(double|single)_blocks\.\d+\.(\w+\.)*(query|key)_norm\.scale$")
_BIAS = re.compile(r"(double_blocks|single_blocks|\w+_in|final_layer)(\.\w+)*\.lora_B\.bias$")


_NO_DECODER = (  # GPT-2, GPT-J, Falcon and BLOOM keep their layers in `transformer.h`, MPT and DBRX in its blocks
    r"(?!h_\d+_|wte$|wpe$|word_embeddings$|encoder_layers_\d+_|blocks_\d+_(?:attn_(?:Wqkv|out_proj)|ffn_\w+_proj)$"
    r"|blocks_\d+_(?:norm_attn_norm_attn|ffn_experts|ffn_router)_)"
)
_TOOLKIT = "#software=.*ai-toolkit"


def _is_numbered(source: Source) -> bool:
    return any(key.endswith((":up", ":down")) for key in source.file.keys)


def _is_gguf(source: Source) -> bool:
    return isinstance(source.file, GgufFile)


def _is_mlx_vlm(source: Source) -> bool:
    halves = sum(key.endswith((".A", ".B")) for key in source.file.keys)
    told = source.config is not None and {"rank", "alpha"} <= source.config.keys()
    return halves > 0 and (told or halves == len(source.file.keys))


def _is_control(source: Source) -> bool:
    able = [key for key in source.file.keys if key.endswith(("_norm.scale", ".lora_B.bias"))]
    return any(_NORM.match(key) or _BIAS.match(key) for key in able)


_XLABS_LAYERS = {
    ("double", "qkv_lora1"): "img_attn.qkv",
    ("double", "qkv_lora2"): "txt_attn.qkv",
    ("double", "proj_lora1"): "img_attn.proj",
    ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1",
    ("single", "proj_lora"): "linear2",
}
_XLABS_KEYS = {(kind, layer): key for (kind, key), layer in _XLABS_LAYERS.items()}
_XLABS_STEM = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(\w+)")
_XLABS_PATH = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def _read_xlabs(stem: str, tail: str) -> str | None:
    found = _XLABS_STEM.fullmatch(stem)
    layer = _XLABS_LAYERS.get((found[1], found[3])) if found else None
    return f"{found[1]}_blocks.{found[2]}.{layer}" if found and layer else None


def _write_xlabs(name: str) -> str | None:
    found = _XLABS_PATH.fullmatch(name)
    key = _XLABS_KEYS.get((found[1], found[3])) if found else None
    return f"{found[1]}_blocks.{found[2]}.processor.{key}" if found and key else None


_PROCESSOR = ".processor."
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


def _read_processor(stem: str, tail: str) -> str | None:
    if tail not in ("down.weight", "up.weight"):
        return stem
    parent, _, last = stem.rpartition(".")
    layer = last.removesuffix("_lora")
    if layer == last:
        return None
    if parent.endswith(".self_attn"):
        return f"{parent}.{_TEXT[layer]}" if layer in _TEXT else None
    known = "to_out.0" if layer == "to_out" else layer
    if not f"{parent}.".endswith(_PROCESSOR) or known not in _ATTENTION:
        return None
    return f"{parent.removesuffix('.processor')}.{known}"


def _write_processor(name: str) -> str | None:
    parent, _, layer = name.removesuffix(".0").rpartition(".")
    known = "to_out.0" if layer == "to_out" else layer
    return f"{parent}{_PROCESSOR}{layer}_lora" if parent and known in _ATTENTION and name.endswith(known) else None


def _has_processors(source: Source) -> bool:
    return any(_PROCESSOR in key for key in source.file.keys)


_ROWS = (
    # PEFT: a folder with `adapter_model.safetensors` and `adapter_config.json`, which holds rank and alpha. Trainers of
    # FLUX that name the original model's layers (`base_model.model.double_blocks.…`: fal, Kontext, FLUX.2) save the
    # same file, usually without the configuration: a dialect, whose alpha is lost.
    Format(
        name="peft",
        example="base_model.model.<module>.lora_A.weight beside adapter_config.json",
        prefixes={"base_model.model.": ""},
        pairs=("lora_A", "lora_A.default", "lora_embedding_A", "bare"),
        alpha=("config", "tensor"),
        bare="config",
        folder=True,
        write_prefix="base_model.model.",
        metadata={"format": "pt"},
        dialects={"ai-toolkit": _TOOLKIT, "bfl": r"base_model\.model\.(double|single)_blocks\."},
    ),
    # kohya sd-scripts and the many tools that write its keys: dots flattened to `_`, one `.alpha` tensor per module.
    # Dialects, which differ only in the words of the module path and are read alike: FLUX (fused q, k, v; with
    # `split_qkv` the halves are block-diagonal, rank 3r or 4r, and alpha still belongs to r), SDXL, musubi-tuner, the
    # doubled underscore, OneTrainer, and LyCORIS as SimpleTuner saves it.
    Format(
        name="kohya",
        example="lora_unet_<module_path>.lora_down.weight with lora_unet_<module_path>.alpha",
        prefixes={
            "lora_unet__": "unet",
            **{f"lora_{component}_": component for component in ("unet", "te", "te1", "te2", "te3", "transformer")},
            "lora_unet_unet_": "unet",
            **{f"lora_{component}_": component for component in ("prior_unet", "prior_te", "te4", "clip_l", "clip_g")},
            **{f"oft_{component}_": component for component in ("unet", "te", "te1", "te2")},
            "lycoris_": "lycoris",
            "lora_": "",
        },
        roots={"lora_transformer_": _NO_DECODER},
        pairs=("lora_down", "lora_A"),
        alpha=("tensor",),
        trainer=("ss_network_dim", "ss_network_alpha"),
        flattened=True,
        write_prefix="lora_unet_",
        dialects={
            "onetrainer": "lora_transformer_",
            "lycoris": "lycoris_",
            "double-underscore": "lora_unet__",
            "flux": r"lora_unet_(double|single)_blocks_",
            "sdxl": r"lora_unet_(input|output)_blocks_|lora_unet_middle_block_",
            "sd": r"lora_unet_((down|up)_blocks|mid_block)_",
            "musubi": r"lora_unet_(transformer_)?blocks_\d+_",
        },
    ),
    # XLabs FLUX: attention processors of the original model, never an alpha. 1 is the image stream, 2 the text stream.
    # In single blocks `qkv_lora` changes the rows of q, k, v, which are the first of `linear1`, so its B has fewer rows
    # than the layer. USO saves the same keys.
    Format(
        name="xlabs",
        example="double_blocks.<n>.processor.qkv_lora1.down.weight",
        prefixes={"diffusion_model.": ""},
        pairs=("down",),
        alpha=("none", "tensor"),
        bare="always",
        naming=Naming(_read_xlabs, _write_xlabs, "double_blocks.<n>.img_attn.qkv or single_blocks.<n>.linear1"),
    ),
    # diffusers up to 0.20: attention processors, never an alpha; `to_out_lora` is the layer `to_out.0`. Text encoders
    # stand beside them as `text_encoder.….lora_linear_layer.down.weight` or, older, `self_attn.to_q_lora.down.weight`,
    # which is the layer `q_proj`.
    Format(
        name="attn-procs",
        example="unet.<module>.processor.to_q_lora.down.weight",
        prefixes={f"{component}.": component for component in ("unet", "text_encoder", "text_encoder_2")},
        pairs=("down", "lora_linear_layer.down"),
        alpha=("none", "tensor"),
        bare="always",
        write_prefix="unet.",
        naming=Naming(_read_processor, _write_processor, "<module>.to_q, to_k, to_v or to_out.0"),
        trait=_has_processors,
    ),
    # ComfyUI's own keys: the model's names behind `diffusion_model.`, any spelling of the halves, `.alpha` or none.
    # Beside the pair a module may have a whole `.diff`, `.diff_b`, `.set_weight`, `.w_norm`, `.b_norm`. ai-toolkit
    # writes the same keys without alpha (alpha = rank by construction): a dialect, known by its metadata only.
    Format(
        name="comfyui",
        example="diffusion_model.<module>.lora_A.weight with diffusion_model.<module>.alpha",
        prefixes={
            **{f"{component}.": component for component in ("diffusion_model", "text_encoders")},
            "model.diffusion_model.": "diffusion_model",
            "text_embedding_projection.": "text_embedding_projection",
        },
        pairs=("lora_A", "lora_A.default", "lora_down", "lora.down", "lora_linear_layer.down", "bare"),
        alpha=("tensor", "beside"),
        write_prefix="diffusion_model.",
        dialects={"ai-toolkit": _TOOLKIT, "bfl": r"diffusion_model\.(double|single)_blocks\."},
    ),
    # diffusers: the component's name before the module path, alpha in the header's `lora_adapter_metadata` or nowhere.
    # `transformer.….lora_down.weight` with an `.alpha` tensor (OneTrainer's and others' way) is a dialect: only the
    # spelling differs, and alpha is read from either home. So is ai-toolkit's file, known by its metadata.
    Format(
        name="diffusers",
        example="transformer.<module>.lora_A.weight, alpha in the header's lora_adapter_metadata",
        prefixes={f"{component}.": component for component in _COMPONENTS},
        pairs=("lora_A", "lora.down", "lora_down", "lora_linear_layer.down", "lora_A.default"),
        alpha=("header", "tensor", "beside"),
        bare="header",
        write_prefix="transformer.",
        metadata={"format": "pt"},
        dialects={"ai-toolkit": _TOOLKIT, "lora-down": r".*\.lora_down\.weight$"},
    ),
    # mlx-lm: a folder with `adapters.safetensors` and `adapter_config.json`, which holds one factor for all modules.
    # The halves are stored transposed: lora_a [in, r], lora_b [r, out] (experts, [e, r, in] and [e, out, r], are not).
    # There is no alpha; `lora_parameters.scale` is the whole factor on B @ A, read here as alpha = scale * rank.
    Format(
        name="mlx",
        example="<module>.lora_a beside adapter_config.json with lora_parameters",
        pairs=("lora_a",),
        alpha=("scale",),
        bare="always",
        folder=True,
        metadata={"format": "mlx"},
        extras={"m": "magnitude"},
        trait=lambda source: any(key.endswith((".lora_a", ".lora_b")) for key in source.file.keys),
        flips=lambda name: ("A", "B"),
        weights_name=MLX_WEIGHTS_NAME,
    ),
    # mlx-vlm: the same folder, the halves called A: [in, r] and B: [r, out]. Its configuration has one rank and one
    # alpha, by which releases up to 0.4.4 multiply; those from 0.5.0 on divide it by the rank (and 0.6.0 writes `mlx`).
    Format(
        name="mlx-vlm",
        example="<module>.A beside adapter_config.json with rank and alpha",
        pairs=("A",),
        alpha=("releases",),
        bare="always",
        folder=True,
        metadata={"format": "mlx"},
        naming=Naming(lambda stem, tail: stem, unwritten, "none that is written"),
        trait=_is_mlx_vlm,
        flips=lambda name: ("A", "B"),
        weights_name=MLX_WEIGHTS_NAME,
    ),
    # llama.cpp's GGUF adapter: one alpha for the file under `adapter.lora.alpha`; without it, or with 0, llama.cpp
    # takes scale 1. The token embedding's A is stored transposed, [tokens, r].
    Format(
        name="gguf",
        example="<tensor>.weight.lora_a in a GGUF file with adapter.lora.alpha",
        pairs=("weight.lora_a",),
        alpha=("kv",),
        bare="always",
        trait=_is_gguf,
        flips=lambda name: ("A",) if name == "token_embd" else (),
        suffix=".gguf",
    ),
    # Black Forest Labs' control LoRAs (FLUX tools): bare names of the original model, never an alpha. Unlike other bare
    # files they train biases and replace whole tensors, the scales of the q and k norms. `img_in` is wider than the
    # base's, which a reader has to pad with zeros.
    Format(
        name="bfl-control",
        example="double_blocks.<n>.img_attn.qkv.lora_A.weight with ….lora_B.bias and ….query_norm.scale",
        pairs=("lora_A",),
        alpha=("none", "tensor"),
        bare="always",
        extras={"query_norm.scale": "query_norm", "key_norm.scale": "key_norm"},
        trait=_is_control,
    ),
    # cloneofsimo's lora: the adapted layers by number, in the order in which the model has them; the metadata say which
    # classes were searched. Never an alpha: training multiplied by 1.
    Format(
        name="cloneofsimo",
        example="unet:<n>:up with unet:<n>:down",
        prefixes={f"{component}:": component for component in ("unet", "text_encoder")},
        pairs=("down",),
        alpha=("none",),
        write_prefix="unet:",
        naming=Naming(lambda stem, tail: stem, unwritten, "a number"),
        trait=_is_numbered,
    ),
    # Stability AI's control LoRA: pairs called `up` and `down` in the names of the original UNet, the rest whole.
    Format(
        name="control-lora",
        example="input_blocks.<n>.….up with lora_controlnet",
        pairs=("bare.down",),
        alpha=("none", "tensor"),
        bare="always",
        naming=Naming(lambda stem, tail: stem, unwritten, "none that is written"),
        trait=lambda source: "lora_controlnet" in source.file.tensors,
        marks=("lora_controlnet",),
    ),
    # DiffSynth-Studio: the model's own names, usually with PEFT's adapter name left in, alpha absent or a tensor. Other
    # tools that save a model's own names are dialects: loralib, torchtune.
    Format(
        name="diffsynth",
        example="<module>.lora_A.default.weight or <module>.lora_A.weight, sometimes with <module>.alpha",
        pairs=(
            "lora_A.default",
            "lora_A",
            "lora_down",
            "lora.down",
            "lora_linear_layer.down",
            "bare",
            "lora_a.weight",
            "adapter.linear_in",
        ),
        alpha=("tensor",),
        bare="always",
        dialects={"ai-toolkit": _TOOLKIT, "loralib": r".*\.lora_A$", "torchtune": r".*\.lora_a\.weight$"},
    ),
)
FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
