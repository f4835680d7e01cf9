"""A few elements that no rounding made are enough: spread over a layer, or in some of its columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from tests.doctor.damage import write_base

Damage = Callable[[Tensor, Tensor, Tensor], Tensor]  # of base, update and merged weight


def of(share: float, value: Callable[[Tensor], Tensor]) -> Damage:
    """Give a share of the elements another value."""
    return lambda base, update, merged: torch.where(torch.rand(merged.shape) < share, value(merged), merged)


def in_columns(count: int, value: Callable[[Tensor, Tensor], Tensor]) -> Damage:
    def damage(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
        merged[:, -count:] = value(base[:, -count:], merged[:, -count:])
        return merged

    return damage


def clamped(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
    limit = 2.5 * update.std()
    return (base.float() + update.clamp(-limit, limit)).to(base.dtype)


def clipped(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
    limit = merged.float().abs().flatten()[:100_000].quantile(0.99).to(merged.dtype)
    return merged.clamp(-limit, limit)


EVERYWHERE: dict[str, Damage] = {
    "one in a thousand zeroed": of(1e-3, torch.zeros_like),
    "one in a hundred zeroed": of(1e-2, torch.zeros_like),
    "one in twenty zeroed": of(5e-2, torch.zeros_like),
    "one in a hundred flipped": of(1e-2, torch.neg),
    "one in a hundred noise": of(1e-2, lambda merged: merged + torch.randn(merged.shape).to(merged.dtype)),
    "the update clamped": clamped,
    "the weight clipped": clipped,
}
COLUMNS: dict[str, Damage] = {
    "unmerged": in_columns(16, lambda base, merged: base),
    "zeroed": in_columns(16, lambda base, merged: torch.zeros_like(merged)),
    "ten times": in_columns(16, lambda base, merged: 10 * merged),
}


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    folder = tmp_path_factory.mktemp("layer")
    return (folder, *write_base(folder, 3e-2))


def verified(layer: tuple[Path, Tensor, Tensor], damage: Damage, *, full: bool) -> MergeReport:
    folder, base, update = layer
    torch.manual_seed(0)
    merged = damage(base, update, (base.float() + update).to(base.dtype))
    save_file({"x.weight": merged.contiguous()}, folder / "merged.safetensors")
    return verify_merge(*(folder / f"{name}.safetensors" for name in ("base", "merged", "lora")), full=full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", EVERYWHERE)
def test_elements_that_no_rounding_made_are_other_changes(
    layer: tuple[Path, Tensor, Tensor], kind: str, full: bool
) -> None:
    report = verified(layer, EVERYWHERE[kind], full=full)
    assert (report.exit_code, report.overall.code) == (1, "LH401"), report.overall.text()
    assert "of its elements" in report.overall.text()
    assert report.measured[0].found.measured == pytest.approx(report.measured[0].found.expected, rel=0.01)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_are_not_merged_alike_are_named(layer: tuple[Path, Tensor, Tensor], kind: str, full: bool) -> None:
    width = layer[1].shape[1]
    report = verified(layer, COLUMNS[kind], full=full)
    assert (report.exit_code, report.overall.code) == (1, "LH401"), report.overall.text()
    assert f"columns {width - 16} to {width - 1}" in report.overall.text()


def by_chance(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
    """Round to either neighbour, the nearer one more often."""
    below = torch.randint(0, 1 << 16, base.shape, dtype=torch.int32)
    return ((base.float() + update).view(torch.int32) + below).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()


def twice(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
    half = (base.float() + update / 2).to(base.dtype)
    return (half.float() + update / 2).to(base.dtype)


@pytest.mark.parametrize(("rounded", "full"), [(by_chance, False), (by_chance, True), (twice, False), (twice, True)])
def test_what_is_rounded_by_chance_or_twice_is_no_other_change(
    layer: tuple[Path, Tensor, Tensor], rounded: Damage, full: bool
) -> None:
    assert verified(layer, rounded, full=full).exit_code == 0


def cut(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
    """Round toward 0, as scripts do that keep the upper half of a float32."""
    return (base.float() + update).view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()


def test_what_is_rounded_toward_zero_is_no_other_base(layer: tuple[Path, Tensor, Tensor]) -> None:
    assert verified(layer, cut, full=False).exit_code == 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("factor", [0.997, 1.002])
def test_a_base_at_another_scale_hides_below_no_rounding(
    layer: tuple[Path, Tensor, Tensor], factor: float, full: bool
) -> None:
    def scaled(base: Tensor, update: Tensor, merged: Tensor) -> Tensor:
        return (factor * base.float() + update).to(base.dtype)

    report = verified(layer, scaled, full=full)
    assert (report.exit_code, report.overall.code) == (1, "LH401"), report.overall.text()
    assert "the base is in it" in report.overall.text()


@pytest.mark.parametrize("wrong", [1.0, 1.03, 0.97])
def test_a_step_that_is_no_longer_that_of_its_codes_is_found(
    layer: tuple[Path, Tensor, Tensor], tmp_path: Path, wrong: float
) -> None:
    folder, base, update = layer
    for name, weight in (("base", base.float()), ("merged", base.float() + update)):
        step = weight.abs().max() / 448
        codes = (weight / step).to(torch.float8_e4m3fn)
        stored = step * (wrong if name == "merged" else 1)
        save_file({"x.weight": codes, "x.weight_scale": stored.reshape(())}, tmp_path / f"{name}.safetensors")
    report = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", folder / "lora.safetensors")
    assert report.exit_code == (wrong != 1), report.overall.text()
    assert (f"the base is in it {wrong:g}" in report.overall.text()) == (wrong != 1)
