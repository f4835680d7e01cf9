"""What the pictures of one loader say: as trained, wrong strength (which factor), noise, nothing, or inconclusive.

The limits were set on the first base pipeline (seed 1) and tested on another one: benchmarks/image_power.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.images.factor import Estimate

Look = Literal["clean", "artifacts", "noise", "broken", "black", "one colour", "one denoiser call"]
Conclusion = Literal[
    "as trained", "wrong strength", "noise", "no visible effect", "broken", "inconclusive", "wrong direction"
]


# Where the verdicts begin; each is a ratio or a share, none an absolute property of a picture.
SAME = 0.03  # an interval that reaches within 3 % of the right strength is not called wrong
CLOSE = 0.12  # an interval that leaves this range around it is too wide to be called right
VISIBLE = 0.01  # 1 - SSIM between base and reference below which nothing can be judged
OWN_NOISE = 5.0  # the effect must be this many times the change that the candidate shows at strength 0
UNEXPLAINED = 0.3  # share of the candidate's change that no strength of the reference explains
ARTIFACTS = (1.35, 2.5, 0.8)  # total variation, noise sigma, content; against the trained look
NOISE = (4.0, 25.0, 0.35)
TRUSTED = 2.5  # beyond this strength pictures decorrelate: only gross factors count there
GROSS = 3.0
FARTHEST = 64.0  # beyond, the reference itself is noise: what a right loader draws there cannot be told from anything


@dataclass(frozen=True)
class StrengthResult:
    """One strength of a loader, judged against the reference at the same strength.

    `effect` is the mean 1 - SSIM between base and reference, `own_noise` the candidate's at strength 0 to the base,
    `look` compares with the look at the trained strength.
    """

    strength: float
    estimate: Estimate | None
    effect: float
    own_noise: float
    look: Look

    @property
    def factor(self) -> float | None:
        """How many times too strong it is at this strength; None at strength 0 or when nothing could be read."""
        return self.estimate.strength / self.strength if self.estimate and self.strength else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `factor`."""
        if self.estimate is None or not self.strength:
            return None
        low, high = sorted(end / self.strength for end in self.estimate.interval)
        return low, high


@dataclass(frozen=True)
class Judgement:
    """The finding over all strengths: `told_by` decides, `factor` comes from the sharpest observation."""

    finding: Conclusion
    told_by: StrengthResult | None
    factor: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""

    @property
    def code(self) -> str | None:
        """The stable code of the violation, None when there is none."""
        codes = {
            "noise": "LH601",
            "wrong strength": "LH602",
            "wrong direction": "LH602",
            "no visible effect": "LH603",
            "broken": "LH502",
        }
        return codes.get(self.finding)


def look_of(total_variation: float, noise_sigma: float, content: float) -> Look:
    """Name the look from medians: ratios of total variation and noise sigma to the trained look, content left."""
    for look, (variation, sigma, left) in (("noise", NOISE), ("artifacts", ARTIFACTS)):
        if total_variation > variation or noise_sigma > sigma or content < left:
            return look  # type: ignore[return-value]
    return "clean"


def judge(observations: Sequence[StrengthResult]) -> Judgement:
    """Judge a loader from its strengths up to `FARTHEST`; the one nearest to 1 names the finding."""
    order = sorted(observations, key=lambda o: (abs(o.strength - 1), o.strength))
    order = [o for o in order if abs(o.strength) <= FARTHEST]
    failed = [o for o in order if o.look in ("broken", "black", "one colour")]
    if failed:
        return Judgement("broken", failed[0], reason=f"{failed[0].look} pictures at strength {failed[0].strength:g}")
    usable = [o for o in order if _usable(o)]
    if not usable:
        return Judgement("inconclusive", None, reason="the LoRA's effect is smaller than what pictures can show")
    sharpest = min(usable, key=_bluntness)
    wrong = [o for o in usable if _is_wrong(o)]
    if wrong:
        return _name_fault(wrong[0], sharpest, _right_somewhere(usable))
    zero = next((o for o in order if o.strength == 0 and o.estimate), None)
    if zero and zero.estimate and zero.estimate.interval[0] > 0.05:
        return Judgement("wrong strength", zero, reason="strength 0 changes the pictures")
    if not any(_is_right(o) for o in usable):
        return Judgement(
            "inconclusive", sharpest, sharpest.factor, sharpest.interval, "the interval is too wide: draw more pictures"
        )
    return Judgement("as trained", sharpest, sharpest.factor, sharpest.interval)


def _usable(o: StrengthResult) -> bool:
    return o.strength != 0 and o.estimate is not None and o.effect >= max(VISIBLE, OWN_NOISE * o.own_noise)


def _is_right(o: StrengthResult) -> bool:
    low, high = o.interval or (0.0, 0.0)
    return low > 1 - CLOSE and high < 1 + CLOSE


def _right_somewhere(usable: Sequence[StrengthResult]) -> bool:
    near = [o for o in usable if _trusted(o)]
    return any(_is_right(o) and not _is_wrong(o) for o in near)


def _is_wrong(o: StrengthResult) -> bool:
    low, high = o.interval or (1.0, 1.0)
    if not _trusted(o):
        return high < 1 / GROSS or low > GROSS
    return high < 1 - SAME or low > 1 + SAME or _off_ladder(o)


def _trusted(o: StrengthResult) -> bool:
    """Whether pictures follow the strength there: the one that was asked for, or the one that they look like."""
    assert o.estimate is not None
    return min(abs(o.strength), abs(o.estimate.strength)) <= TRUSTED


def _off_ladder(o: StrengthResult) -> bool:
    assert o.estimate is not None
    return o.estimate.residual > UNEXPLAINED and abs(o.estimate.strength) < TRUSTED


def _bluntness(o: StrengthResult) -> tuple[bool, float]:
    """Order observations from sharp to blunt: an interval around a strength where pictures still follow it is sharp."""
    assert o.estimate is not None
    place = abs(o.estimate.strength)
    low, high = o.interval or (0.0, 0.0)
    return (not 0.2 <= place <= 2.5, (high - low) if 0.2 <= place <= 2.5 else abs(place - 1))


def _name_fault(o: StrengthResult, sharpest: StrengthResult, any_right: bool) -> Judgement:
    assert o.estimate is not None
    factor, interval = sharpest.factor, sharpest.interval
    if o.look == "noise" and abs(o.strength) <= 1:
        return Judgement("noise", o, factor, interval)
    low, high = o.estimate.interval
    if low < 0.05 * abs(o.strength) and high < 0.1 * abs(o.strength) and high > -0.1 * abs(o.strength):
        return Judgement("no visible effect", o, factor, interval)
    if _off_ladder(o):
        return Judgement("wrong direction", o, factor, interval, "no strength of the reference looks like it")
    if any_right:
        return Judgement(
            "wrong strength",
            o,
            o.factor,
            o.interval,
            f"at strength {o.strength:g}, yet right at others: strength is mishandled",
        )
    return Judgement("wrong strength", o, factor, interval)
