"""A page of the site: where it lies, what it is made from, what stands in the JSON beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Page:
    """One page: its address below the site, the template with its values, what stands in the JSON beside it."""

    address: str
    kind: str
    title: str
    template: str
    values: dict[str, Any]
    data: dict[str, Any]
    words: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The way from this page to the front page's folder."""
        return "../" * self.address.count("/")
