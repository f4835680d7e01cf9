"""How the suite is spread over xdist's workers: the families of one cell go to one worker, which checks it once."""

from __future__ import annotations

import re

from xdist.scheduler import LoadGroupScheduling

from harness.checks.family import family_names

_FAMILY = re.compile(rf"::test_loader\[(?P<cell>.+)-(?:{'|'.join(family_names())})\]")


class CellScheduling(LoadGroupScheduling):  # type: ignore[misc]
    """xdist's `loadgroup`, with a group of its own for each cell.

    Marks cannot say it: xdist hands them on inside the node id, and since pytest 9.2 a changed node id is not kept.
    """

    def _split_scope(self, nodeid: str) -> str:
        found = _FAMILY.search(nodeid)
        scope: str = found["cell"] if found else super()._split_scope(nodeid)
        return scope
