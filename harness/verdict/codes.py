"""The stable codes: what each one means, its likely cause and its fix. Never renumbered."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import UserError


@dataclass(frozen=True)
class Code:
    """One kind of fault; `family` is the check it belongs to."""

    code: str
    title: str
    family: str
    cause: str
    fix: str


_ROWS = (
    ("LH101", "LoRA has no effect", "coverage", "no key of the file reached a layer of the model",
     "match the file's key names against the model's module paths, and raise when nothing matches"),
    ("LH102", "some modules not loaded", "coverage", "a filter or name table leaves these layers out",
     "load every module the file has; list what was skipped"),
    ("LH103", "keys silently ignored", "coverage", "keys without a home are dropped without a word",
     "report every key that was not used"),
    ("LH104", "wrong module received it", "direction", "names are matched by prefix, suffix or order",
     "compare whole dotted paths: `blocks.1` is a prefix of `blocks.10`, `to_out` a part of `to_add_out`"),
    ("LH201", "alpha not divided by rank", "scale", "the delta is multiplied by alpha as it stands in the file",
     "multiply by alpha / rank, where rank = A.shape[0]"),
    ("LH202", "alpha ignored", "scale", "the delta is B @ A times the strength; alpha is never read",
     "read the module's alpha and multiply by alpha / rank"),
    ("LH203", "rank-stabilised scaling mixed up", "scale", "alpha / sqrt(rank) is used for alpha / rank, or the reverse",
     "divide by sqrt(rank) only when the adapter says use_rslora"),
    ("LH204", "one alpha or rank for all modules", "scale", "one module's alpha or rank is used for the whole file",
     "read alpha and rank of each module on its own"),
    ("LH205", "alpha truncated or clamped", "scale", "alpha passes through an integer, a rounding or a bound",
     "keep alpha as a float"),
    ("LH206", "scale applied twice, squared or as its root", "scale",
     "alpha / rank is applied on two paths (file and call, A and B), or only once under a root split over A and B",
     "apply alpha / rank exactly once"),
    ("LH207", "strength mishandled", "strength", "the strength is ignored, clamped, squared, or 0 and negative values are not honoured",
     "multiply the delta by the strength as it is; test `is None`, not truth"),
    ("LH208", "fused rank used", "scale", "alpha is divided by the stacked rank (3r) of a merged q/k/v",
     "divide alpha by the rank of one part"),
    ("LH209", "other scale law", "scale", "the delta has the right direction and another size than strength * alpha / rank",
     "multiply by strength * alpha / rank"),
    ("LH301", "transposed, or A and B swapped", "direction", "the product is A^T @ B^T or its transpose", "use B @ A: [out, r] @ [r, in]"),
    ("LH302", "q/k/v order or slice wrong", "direction", "the delta of a merged layer lands in other rows",
     "stack q, k, v in the order of the merged layer"),
    ("LH303", "convolution layout wrong", "direction", "a convolution's delta is reshaped along the wrong axes",
     "keep [out, in, kh, kw]"),
    ("LH304", "variant maths wrong", "direction", "part of A or B is left out, W is scaled too, or the formula of DoRA, LoHa, LoKr, a bias or an embedding differs from PEFT's",
     "use all of A and B, leave W as it is, and follow the variant's formula"),
    ("LH401", "an untouched module changed", "side_effects", "a layer or parameter the file does not name has other values now",
     "write only to the layers the file names"),
    ("LH402", "loading twice is neither additive nor a replacement", "side_effects", "state of the first load leaks into the second",
     "start each load from the file and the current weights"),
    ("LH403", "unload does not restore", "side_effects", "the base weights are not what they were before loading",
     "keep a copy of the base weights"),
    ("LH404", "the LoRA file was changed", "side_effects", "the loader writes to the file it reads", "open the file read-only"),
    ("LH405", "several LoRAs do not add up", "side_effects", "the second LoRA replaces or rescales the first", "sum the deltas"),
    ("LH501", "precision lost beyond the dtype's rounding", "numerics", "the delta or the sum is computed in a coarser dtype than the model's",
     "compute the delta in float32 and round once"),
    ("LH502", "non-finite weights", "numerics", "an overflow or a division by zero reaches the weights", "check rank and alpha before dividing; compute in float32"),
    ("LH601", "noise", "images", "the LoRA is applied many times too strongly", "divide alpha by the rank"),
    ("LH602", "image at the wrong strength", "images", "the picture matches the reference at another strength", "multiply by strength * alpha / rank"),
    ("LH603", "no visible effect", "images", "the LoRA does not reach the model, or is far too weak", "check coverage and scale with `lora-harness check`"),
    ("LH701", "no alpha anywhere", "file", "the file carries no alpha, so the trained scale is unknown",
     "look up lora_alpha in the training configuration and pass lora_alpha / rank as the strength"),
    ("LH702", "alpha missing in some modules", "file", "only some modules carry an alpha; readers disagree on the rest", "write alpha for every module"),
    ("LH703", "alpha / rank differs between modules", "file", "readers that keep one number for the file are wrong", "use a reader that takes each module's own alpha"),
    ("LH704", "fused block-diagonal", "file", "q, k and v were stacked: the stored rank is three times the trained one", "divide alpha by the trained rank"),
    ("LH705", "zero, negative or non-finite alpha", "file", "readers take 0 as 0, as 1 or as the rank", "write the alpha that was trained with"),
    ("LH706", "missing partner or rank mismatch", "file", "a module has only one of its two matrices, or they do not fit", "save the file again"),
    ("LH707", "non-finite weights in the file", "file", "training diverged, or half precision overflowed on saving", "go back to an earlier checkpoint"),
    ("LH708", "keys not understood", "file", "the file holds keys no known format explains", "check which tool wrote it"),
    ("LH709", "DoRA axis or layout ambiguous", "file", "the shapes allow two readings", "name the trainer"),
    ("LH710", "alpha rounded", "file", "alpha was stored in half precision and lost digits", "store alpha in float32"),
    ("LH711", "declared alpha disagrees with the tensors", "file", "metadata and tensors name different alphas", "keep one of them"),
    ("LH799", "unreadable", "file", "the file is damaged or of an unknown format", "see the sentence with it"),
    ("LH901", "loader raised", "smoke", "the call ended in an exception, a hang or a dead process", "see the message; if the format or bench is not supported, declare it with @loader(formats=..., benches=...)"),
    ("LH902", "wrong shape or keys returned", "smoke", "the loader returned something that is not the model", "return the model or None"),
)  # fmt: skip

CODES = {row[0]: Code(*row) for row in _ROWS}


def explain(code: str) -> Code:
    """Return the code's meaning.

    Raises:
        UserError: there is no such code.
    """
    found = CODES.get(code.upper())
    if found is None:
        raise UserError(f"code={code!r}: no such code; known are {', '.join(CODES)}")
    return found
