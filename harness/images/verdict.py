"""What the pictures of one loader say: as trained, wrong strength (which factor), noise, nothing, or inconclusive.

The limits were set on the first base pipeline (seed 1) and tested on another one: benchmarks/image_power.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.images.factor import Estimate

Look = Literal["clean", "artifacts", "noise", "broken", "black", "one colour"]
Finding = Literal[
    "as trained", "wrong strength", "noise", "no visible effect", "broken", "inconclusive", "wrong direction"
]


@dataclass(frozen=True)
class Limits:
    """Where the verdicts begin; each is a ratio or a share, none an absolute property of a picture."""

    same: float = 0.03  # an interval that reaches within 3 % of the right strength is not called wrong
    close: float = 0.12  # an interval that leaves this range around it is too wide to be called right
    visible: float = 0.01  # 1 - SSIM between base and reference below which nothing can be judged
    own_noise: float = 5.0  # the effect must be this many times the change that the candidate shows at strength 0
    unexplained: float = 0.3  # share of the candidate's change that no strength of the reference explains
    artifacts: tuple[float, float, float] = (
        1.35,
        2.5,
        0.8,
    )  # total variation, noise sigma, content; against the trained look
    noise: tuple[float, float, float] = (4.0, 25.0, 0.35)
    trusted: float = 2.5  # beyond this strength pictures decorrelate: only gross factors count there
    gross: float = 3.0


LIMITS = Limits()


@dataclass(frozen=True)
class Observation:
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

    finding: Finding
    told_by: Observation | None
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


def look_of(total_variation: float, noise_sigma: float, content: float, *, limits: Limits = LIMITS) -> Look:
    """Name the look from medians: ratios of total variation and noise sigma to the trained look, content left."""
    for look, (variation, sigma, left) in (("noise", limits.noise), ("artifacts", limits.artifacts)):
        if total_variation > variation or noise_sigma > sigma or content < left:
            return look  # type: ignore[return-value]
    return "clean"


def judge(observations: Sequence[Observation], *, limits: Limits = LIMITS) -> Judgement:
    """Judge a loader from all its strengths; the one nearest to 1 names the finding."""
    order = sorted(observations, key=lambda o: (abs(o.strength - 1), o.strength))
    failed = [o for o in order if o.look in ("broken", "black", "one colour")]
    if failed:
        return Judgement("broken", failed[0], reason=f"{failed[0].look} pictures at strength {failed[0].strength:g}")
    usable = [o for o in order if _usable(o, limits)]
    if not usable:
        return Judgement("inconclusive", None, reason="the LoRA's effect is smaller than what pictures can show")
    sharpest = min(usable, key=_bluntness)
    wrong = [o for o in usable if _is_wrong(o, limits)]
    if wrong:
        return _name_fault(wrong[0], sharpest, _right_somewhere(usable, limits), limits)
    zero = next((o for o in order if o.strength == 0 and o.estimate), None)
    if zero and zero.estimate and zero.estimate.interval[0] > 0.05:
        return Judgement("wrong strength", zero, reason="strength 0 changes the pictures")
    if not any(_is_right(o, limits) for o in usable):
        return Judgement(
            "inconclusive", sharpest, sharpest.factor, sharpest.interval, "the interval is too wide: draw more pictures"
        )
    return Judgement("as trained", sharpest, sharpest.factor, sharpest.interval)


def _usable(o: Observation, limits: Limits) -> bool:
    return (
        o.strength != 0 and o.estimate is not None and o.effect >= max(limits.visible, limits.own_noise * o.own_noise)
    )


def _is_right(o: Observation, limits: Limits) -> bool:
    low, high = o.interval or (0.0, 0.0)
    return 1 - limits.close < low and high < 1 + limits.close


def _right_somewhere(usable: Sequence[Observation], limits: Limits) -> bool:
    near = [o for o in usable if abs(o.strength) <= limits.trusted]
    return any(_is_right(o, limits) and not _is_wrong(o, limits) for o in near)


def _is_wrong(o: Observation, limits: Limits) -> bool:
    low, high = o.interval or (1.0, 1.0)
    if abs(o.strength) > limits.trusted:
        return high < 1 / limits.gross or low > limits.gross
    return high < 1 - limits.same or low > 1 + limits.same or _off_ladder(o, limits)


def _off_ladder(o: Observation, limits: Limits) -> bool:
    assert o.estimate is not None
    return o.estimate.residual > limits.unexplained and abs(o.estimate.strength) < limits.trusted


def _bluntness(o: Observation) -> tuple[bool, float]:
    """Order observations from sharp to blunt: an interval around a strength where pictures still follow it is sharp."""
    assert o.estimate is not None
    place = abs(o.estimate.strength)
    low, high = o.interval or (0.0, 0.0)
    return (not 0.2 <= place <= 2.5, (high - low) if 0.2 <= place <= 2.5 else abs(place - 1))


def _name_fault(o: Observation, sharpest: Observation, any_right: bool, limits: Limits) -> Judgement:
    assert o.estimate is not None
    factor, interval = sharpest.factor, sharpest.interval
    if o.look == "noise" and abs(o.strength) <= 1:
        return Judgement("noise", o, factor, interval)
    low, high = o.estimate.interval
    if low < 0.05 * abs(o.strength) and high < 0.1 * abs(o.strength) and high > -0.1 * abs(o.strength):
        return Judgement("no visible effect", o, factor, interval)
    if _off_ladder(o, limits):
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
