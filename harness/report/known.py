"""Known failures of a run, folded by what they are an instance of: one row per finding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from harness.law.findings import Finding, findings
from harness.report.links import cited, finding_link, finding_of_link
from harness.report.summary import digest, place, short_title
from harness.verdict.verdict import Verdict


@dataclass(frozen=True)
class KnownGroup:
    """The known failures of one finding, or of one link or reason where no finding is named."""

    link: str
    verdicts: tuple[Verdict, ...]

    @property
    def anchor(self) -> str:
        """The group's stable id inside a report."""
        return "known-" + digest(self.link or self.reasons[0])

    @property
    def page(self) -> str:
        """The name of the finding, empty when the link is to something else."""
        return finding_of_link(self.link)

    @property
    def finding(self) -> Finding | None:
        """The finding, where there is one."""
        return findings().get(self.page)

    @property
    def what(self) -> str:
        """What goes wrong, in a sentence: the finding's, else the reason that was recorded first."""
        return self.finding.what if self.finding else self.reasons[0]

    @cached_property
    def reasons(self) -> list[str]:
        """Every reason that was recorded, without its link."""
        return list(dict.fromkeys(cited(v.reason or short_title(v))[0] for v in self.verdicts))

    @property
    def address(self) -> str | None:
        """Where to read more: a page of the site, or the link itself when it is an address."""
        return finding_link(self.page) or (self.link if self.link.startswith(("https://", "http://")) else None)

    @property
    def codes(self) -> list[str]:
        """The codes, the most frequent first."""
        return _often(v.code for v in self.verdicts if v.code)

    @property
    def loaders(self) -> list[str]:
        """The loaders in which it was seen."""
        return _often(v.loader for v in self.verdicts)

    @cached_property
    def cells(self) -> dict[tuple[str, str], Verdict]:
        """One verdict per (loader, place) in which it was seen."""
        return {(v.loader, place(v)): v for v in reversed(self.verdicts)}

    @property
    def formats(self) -> list[str]:
        """The formats in which it was seen."""
        return _often(v.format for v in self.verdicts if v.format)


def known_groups(verdicts: Iterable[Verdict]) -> list[KnownGroup]:
    """Return the expected failures by finding, those of the most cells first."""
    folded: dict[str, list[Verdict]] = {}
    links: dict[str, str] = {}
    for verdict in verdicts:
        if verdict.outcome == "xfailed":
            reason, link, _ = cited(verdict.reason or "")
            links[link or reason] = link
            folded.setdefault(link or reason, []).append(verdict)
    found = [KnownGroup(links[key], tuple(group)) for key, group in folded.items()]
    return sorted(found, key=lambda group: -len(group.cells))


def _often(names: Iterable[str]) -> list[str]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return sorted(counted, key=lambda name: -counted[name])
