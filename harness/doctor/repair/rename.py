"""The names of an adapter's modules in another format: flattened or dotted, behind the prefix of their component."""

from __future__ import annotations

from collections.abc import Iterable

from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, match_modules
from harness.text import count, printable

_DENOISER = frozenset({"", "unet", "transformer", "diffusion_model", "lycoris"})
_UNET_LAYERS = ("down_blocks.", "up_blocks.", "mid_block.", "down_blocks_", "up_blocks_")
_TEXT_ENCODERS = (
    frozenset({"te", "te1", "text_encoder", "text_encoders"}), frozenset({"te2", "text_encoder_2"}),
    frozenset({"te3", "text_encoder_3"}),
)  # fmt: skip


def renamed(adapter: LoraAdapter, to: str, model_names: Iterable[str] | None) -> dict[str, str]:
    """Return {module of the adapter: name to write}.

    Raises:
        UserError: flattened names without the model's own, or names that fit no layer of the model.
    """
    components = {module.component for module in adapter.modules.values()}
    if len(components) > 1:
        listed = ", ".join(sorted(component or "no prefix" for component in components))
        raise UserError(f"{adapter.path}: adapts several components ({listed}); one file per component is written")
    if not adapter.flattened or (FORMATS[to].flattened and model_names is None):
        return {name: module.name for name, module in adapter.modules.items()}
    if model_names is None:
        raise UserError(
            f"{adapter.path}: its names are flattened; {to} needs the model's layers: --model-names or --base"
        )
    matched, lost = match_modules(adapter, model_names)
    if lost:
        what = f"{count(len(lost), 'module')} fit no single layer of the model, such as {printable(lost[0])}"
        raise UserError(f"{adapter.path}: {what}")
    return matched


def prefix_of(adapter: LoraAdapter, to: str, names: Iterable[str]) -> str | None:
    """Return the prefix that `to` gives the adapter's component; None for the one it writes by itself.

    Raises:
        UserError: the format has no place for this component.
    """
    component = next(iter(adapter.modules.values())).component
    by_component = {owner: prefix for prefix, owner in reversed(tuple(FORMATS[to].prefixes.items()))}
    if component in _DENOISER:
        is_unet = any(name.startswith(_UNET_LAYERS) for name in names)
        return by_component.get("unet") if is_unet and to == "diffusers" else None
    alike = next((names for names in _TEXT_ENCODERS if component in names), frozenset({component}))
    found = next((by_component[name] for name in sorted(alike, reverse=True) if name in by_component), None)
    if found is None and FORMATS[to].prefixes and FORMATS[to].write_prefix not in ("", "base_model.model."):
        raise UserError(f"{adapter.path}: {to} has no place for the component {component}")
    return found
