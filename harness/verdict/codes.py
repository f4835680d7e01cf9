"""The stable codes: what each one means, how grave it is, which checks emit it, its cause and its fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from harness.errors import UserError

Severity = Literal["fatal", "error", "warning"]
"""fatal: nothing can be read. error: wrong for every reader. warning: a convention on which readers differ."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
Check = Literal[
    "smoke",
    "coverage",
    "silence",
    "scale",
    "strength",
    "direction",
    "side_effects",
    "numerics",
    "images",
    "verify",
    "inspect",
]
"""What emits codes: the families of `check`, the pictures of `sweep`, `verify`, and `inspect` with `audit`."""


@dataclass(frozen=True)
class Code:
    """One kind of fault, never renumbered.

    `checks` are what emits it, the one that it belongs to first. Codes in `explains`, seen beside it, are only symptoms.
    """

    code: str
    title: str
    checks: tuple[Check, ...]
    cause: str
    fix: str
    severity: Severity = "error"
    explains: tuple[str, ...] = ()

    @property
    def family(self) -> Check:
        """The check that it belongs to."""
        return self.checks[0]


_ALL = (
    Code("LH101", "LoRA has no effect", ("coverage", "verify"), "no key of the file reached a layer of the model",
         "match the file's key names against the model's module paths, and raise when nothing matches"),
    Code("LH102", "some modules not loaded", ("coverage", "verify"), "a filter or name table leaves these layers out",
         "load every module the file has; list what was skipped"),
    Code("LH103", "keys silently ignored", ("silence", "verify"), "keys without a home are dropped without a word", "raise, warn or log when a key was not used; refuse what the loader does not know"),
    Code("LH104", "wrong module received it", ("direction", "verify"), "names are matched by prefix, suffix or order",
         "compare whole dotted paths: `blocks.1` is a prefix of `blocks.10`, `to_out` a part of `to_add_out`", explains=("LH101", "LH102", "LH301", "LH304", "LH306", "LH501")),
    Code("LH201", "alpha not divided by rank", ("scale", "verify"), "the delta is multiplied by alpha as it stands in the file",
         "multiply by alpha / rank, where rank = A.shape[0]"),
    Code("LH202", "alpha ignored", ("scale", "verify"), "the delta is B @ A times the strength; alpha is never read",
         "read the module's alpha and multiply by alpha / rank"),
    Code("LH203", "rank-stabilised scaling mixed up", ("scale", "verify"), "alpha / sqrt(rank) is used for alpha / rank, or the reverse",
         "divide by sqrt(rank) only when the adapter says use_rslora"),
    Code("LH204", "another module's alpha or rank", ("scale", "verify"), "one module's alpha or rank is used for another, or for the whole file",
         "read alpha and rank of each module on its own"),
    Code("LH205", "alpha truncated or clamped", ("scale", "verify"), "alpha, or alpha / rank, passes through an integer, a rounding or a bound", "keep alpha and the scale as they are"),
    Code("LH206", "scale applied twice, squared or as its root", ("scale", "verify"), "alpha / rank is applied on two paths (file and call, A and B, two names of one weight), or only once under a root split over A and B",
         "apply alpha / rank exactly once"),
    Code("LH207", "strength mishandled", ("strength", "verify"), "the strength is ignored, clamped, squared, or 0 and negative values are not honoured",
         "multiply the delta by the strength as it is, not by the last one too; test `is None`, not truth"),
    Code("LH208", "fused rank used", ("scale", "verify"), "alpha is divided by the stacked rank (3r) of a merged q/k/v", "divide alpha by the rank of one part"),
    Code("LH209", "other scale law", ("scale", "verify"), "the delta has the right direction and another size than strength * alpha / rank",
         "multiply by strength * alpha / rank"),
    Code("LH301", "transposed, or A and B swapped", ("direction", "verify"), "the product is A^T @ B^T or its transpose", "use B @ A: [out, r] @ [r, in]; only a layer that stores [in, out] (Conv1D) takes its transpose", explains=("LH306",)),
    Code("LH302", "q/k/v order or slice wrong", ("direction", "verify"), "rows of the delta land in other rows: of a merged layer, or of heads (rotary layouts, groups)",
         "stack q, k, v in the order of the merged layer, and leave the rows of each head where the model has them", explains=("LH101", "LH102", "LH306")),
    Code("LH303", "convolution layout wrong", ("direction",), "a convolution's delta is reshaped along the wrong axes", "keep [out, in, kh, kw]", explains=("LH306",)),
    Code("LH304", "maths of the update wrong", ("direction", "verify"), "part of A or B is left out, W is scaled too, or the formula of DoRA, LoHa, LoKr, a bias or an embedding differs from PEFT's",
         "use all of A and B, leave W as it is, and follow the variant's formula"),
    Code("LH305", "right for unit vectors alone", ("direction",), "the layer's answer to an input is not the sum of its answers to the input's parts: a gate, a clamp or a cache in the way",
         "add strength * alpha / rank * B @ A @ x for every x", explains=("LH306",)),
    Code("LH306", "direction unexplained", ("direction",), "the change is no multiple of B @ A, and no mistake that is known explains it",
         "compare the layer's change with strength * alpha / rank * B @ A, element by element"),
    Code("LH401", "an untouched module changed", ("side_effects", "verify"), "a layer or parameter the file does not name has other values now",
         "write only to the layers the file names; give one that shares its weight with another a weight of its own"),
    Code("LH402", "loading twice is neither additive nor a replacement", ("side_effects",), "state of the first load leaks into the second",
         "start each load from the file and the current weights"),
    Code("LH403", "unload does not restore", ("side_effects",), "the base weights are not what they were before loading", "keep a copy of the base weights, and take away the hooks and layers that loading put in", explains=("LH408",)),
    Code("LH404", "the LoRA file was changed", ("side_effects",), "the loader writes to the file it reads", "open the file read-only"),
    Code("LH405", "several LoRAs do not add up", ("side_effects",), "the second LoRA replaces or rescales the first", "sum the deltas"),
    Code("LH406", "training mode or dropout left on", ("side_effects",), "the model, or a dropout that the loader adds, is in training mode; or what a layer answers depends on how often it was asked",
         "give back the mode that the model had: `.eval()` on what is added, dropout only while training", explains=("LH102", "LH104", "LH301", "LH302", "LH304", "LH305", "LH306", "LH407", "LH501")),
    Code("LH407", "another effect later", ("side_effects",), "a hook takes itself away, a counter decides, models share what holds the LoRA, or it hangs on objects that a copy, a cast or a saved state does not have",
         "keep the delta in the weights, or in parameters and buffers of the layer; look layers up in the module that is called", explains=("LH305",)),
    Code("LH408", "a file loaded before comes back", ("side_effects",), "deltas are cached under the file's name or path, under a shape, or with the strength in them",
         "key a cache by the file's content, keep no strength in it, and empty it when a LoRA is unloaded", explains=("LH101", "LH102", "LH104", "LH209", "LH301", "LH302", "LH303", "LH304", "LH306", "LH401", "LH402", "LH405", "LH407", "LH501")),
    Code("LH501", "precision lost beyond the dtype's rounding", ("numerics",), "the delta or the sum is computed in a coarser dtype than the model's",
         "compute the delta in float32 and round once", explains=("LH306",)),
    Code("LH502", "non-finite weights", ("numerics", "images", "verify"), "an overflow or a division by zero reaches the weights",
         "check rank and alpha before dividing; compute in float32"),
    Code("LH601", "noise", ("images",), "the LoRA is applied many times too strongly",
         "compare its scale with alpha / rank: `lora-harness check` says which law it follows"),
    Code("LH602", "image at the wrong strength", ("images",), "the picture matches the reference at another strength",
         "compare its scale with strength * alpha / rank: `lora-harness check` says which law it follows"),
    Code("LH603", "no visible effect", ("images",), "the LoRA does not reach the model, or is far too weak", "check coverage and scale with `lora-harness check`"),
    Code("LH701", "no alpha anywhere", ("inspect",), "the file carries no alpha, so the trained scale is unknown",
         "look up lora_alpha in the training configuration and pass lora_alpha / rank as the strength", "warning"),
    Code("LH702", "alpha missing in some modules", ("inspect",), "only some modules carry an alpha; readers disagree on the rest",
         "write alpha for every module", "warning"),
    Code("LH703", "alpha / rank differs between modules", ("inspect",), "readers that keep one number for the file are wrong",
         "use a reader that takes each module's own alpha", "warning"),
    Code("LH704", "fused block-diagonal", ("inspect",), "q, k and v were stacked: the stored rank is three times the trained one",
         "divide alpha by the trained rank", "warning"),
    Code("LH705", "alpha zero, negative or no finite number", ("inspect",), "readers take 0 as 0, as 1 or as the rank, and refuse what is no number", "write the alpha that was trained with"),
    Code("LH706", "missing partner or rank mismatch", ("inspect",), "a module has only one of its two matrices, or they do not fit", "save the file again"),
    Code("LH707", "non-finite weights in the file", ("inspect", "verify"), "training diverged, or half precision overflowed on saving",
         "go back to an earlier checkpoint"),
    Code("LH708", "keys not understood", ("inspect",), "the file holds keys no known format explains", "check which tool wrote it", "warning"),
    Code("LH709", "DoRA axis or layout ambiguous", ("inspect",), "the shapes allow two readings", "name the trainer", "warning"),
    Code("LH710", "alpha rounded", ("inspect",), "alpha was stored in half precision and lost digits", "store alpha in float32", "warning"),
    Code("LH711", "declared alpha disagrees with the tensors", ("inspect",), "metadata and tensors name different alphas", "keep one of them"),
    Code("LH712", "wrapper left in the names", ("inspect",), "the model was saved inside torch.compile, FSDP or DDP, whose words stand in the names: PEFT and diffusers find none of them",
         "strip the wrapper's words: `lora-harness repair` writes plain names"),
    Code("LH713", "no effect", ("inspect",), "in every module one factor of the update is all zero: training took no step, or the initial weights were saved",
         "check that the trained weights were saved"),
    Code("LH714", "modules without effect", ("inspect",), "in some modules one factor of the update is all zero", "check whether these modules were trained at all", "warning"),
    Code("LH715", "two naming schemes in one file", ("inspect",), "names of two schemes for the layers of one model: most readers convert one of them and leave out the rest, some add both",
         "write all names in one scheme: `lora-harness repair --base`", "warning"),
    Code("LH716", "scale read differently by versions", ("inspect",), "mlx-lm before June 2024 multiplied scale * alpha / rank, later versions take scale alone; mlx-vlm up to 0.4.4 multiplied by alpha, later versions by alpha / rank",
         "load it with the release that trained it, or write the factor that was trained with as scale, and no alpha", "warning"),
    Code("LH717", "outlier among its kind", ("inspect",), "one module, or one element, is far larger than those of the same kind in other blocks",
         "look at the training run, or at who made the file: it decides what the whole LoRA does", "warning"),
    Code("LH718", "no layer in the base for a part", ("inspect",), "the file adapts layers that this base does not have, or not in this form",
         "check that it is the base that the LoRA was trained on", "warning"),
    Code("LH719", "not for this base", ("inspect",), "nothing fits, or layers have other shapes: the LoRA was trained on another model",
         "take the base that the LoRA was trained on"),
    Code("LH720", "PEFT refuses or ignores it", ("inspect",), "the configuration or the names are not those of the tensors",
         "write the configuration that belongs to the tensors, and the names that the model has"),
    Code("LH721", "PEFT takes a part of it", ("inspect",), "the configuration leaves out tensors of the file, or names layers that have none",
         "write the configuration that belongs to the tensors", "warning"),
    Code("LH722", "a second file of weights beside", ("inspect",), "an older or newer version lies in the same folder", "keep one of them", "warning"),
    Code("LH723", "must not be merged as it is", ("inspect",), "B @ A is not the difference to the original base, or acts on some tokens alone",
         "load it with PEFT, or convert it first", "warning"),
    Code("LH724", "refused by the engine", ("inspect",), "the serving engine has no such feature, or does not take such names",
         "see the rule with it; merge the LoRA into the base, or train without it"),
    Code("LH725", "the engine needs an option, or leaves out a part", ("inspect",), "the engine's limit is lower, or it passes over what it does not know",
         "start the engine with the option named, or merge the LoRA into the base", "warning"),
    Code("LH726", "no usable rank in the configuration", ("inspect",), "the rank, or that of a pattern, is no whole number: PEFT refuses it",
         "write the rank that the tensors have, as a whole number"),
    Code("LH727", "patterns of the configuration cannot be used", ("inspect",), "no object of names and numbers, no valid regular expression, or one that takes too long to match",
         "write the names of the modules as they are"),
    Code("LH797", "no known LoRA layout", ("inspect",), "the file is intact, and no LoRA: a full checkpoint, an embedding, a git-lfs pointer, or the layout of an unknown tool",
         "see the sentence with it", "fatal"),
    Code("LH798", "not judged", ("inspect",), "what read the file was ended from outside, twice", "run it again, with --resume: only such files are read again", "warning"),
    Code("LH799", "unreadable", ("inspect",), "the file is damaged, or cannot be read", "see the sentence with it", "fatal"),
    Code("LH901", "loader raised", ("smoke", "images"), "the call ended in an exception, a hang or a dead process",
         "see the message; if the format or bench is not supported, declare it with @loader(formats=..., benches=...)"),
    Code("LH902", "wrong shape or keys returned", ("smoke", "verify"), "what came back is not the model, a model that does not run (another dtype, another signature), or not what an engine answers",
         "return the model or None; an engine: one finite tensor of the shape that the model itself answers"),
    Code("LH903", "refused by the loader", ("smoke", "images"), "the loader says itself that it does not take this file",
         "support it, or declare it: @loader(formats=..., benches=..., dtypes=..., file_dtypes=..., unsupported=...); what it refuses by rank or alpha is a known failure"),
)  # fmt: skip

CODES = {code.code: code for code in _ALL}


def explain(code: str) -> Code:
    """Return the code's meaning.

    Raises:
        UserError: there is no such code.
    """
    found = CODES.get(code.upper())
    if found is None:
        raise UserError(f"code={code!r}: no such code; known are {', '.join(CODES)}")
    return found
