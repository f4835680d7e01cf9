"""How often garbage is looked for: Python's own rhythm, and a seldom one for code that is known to leave little."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
SELDOM = (20_000, *USUAL[1:])
"""New objects between collections; with 700, a tenth of the time of importing torch and PEFT goes into looking."""
