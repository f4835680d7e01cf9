"""A child that goes on in another interpreter, or among other packages: the same pipes, limits and end, other code.

The parent forks and fences it like every child; it then becomes the other interpreter, which imports this package by
its path, so that of it only what answers must be installed there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from harness.isolation import child
from harness.isolation.child import Ends

_PACKAGE = Path(__file__).parents[1]
# `harness` by its path, whatever else has that name there; its folder must not bring other packages along
_BEGIN = """
import importlib.util as u, json, os, sys
told = json.loads(sys.argv[1])
os.environ.update(told["variables"])
sys.path[:0] = told["folders"]
spec = u.spec_from_file_location("harness", told["harness"] + "/__init__.py")
sys.modules["harness"] = u.module_from_spec(spec)
spec.loader.exec_module(sys.modules["harness"])
from harness.isolation.elsewhere import call
call(told["go"], told)
"""


@dataclass(frozen=True)
class Elsewhere:
    """Another interpreter, or this one with other packages first, and what answers orders there.

    `folders` are searched for packages before the interpreter's own, `variables` are set in its environment. `answer`
    is the `module:function` that is called there once with `told`, JSON, and returns what answers orders.
    """

    answer: str
    told: Mapping[str, Any]
    folders: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    python: str = sys.executable

    def words(self, go: str, **more: Any) -> list[str]:
        """Return the program that calls the `module:function` in `go` there, with what is told and `more`."""
        where = {"harness": str(_PACKAGE), "folders": self.folders, "variables": dict(self.variables), "go": go}
        return [self.python, "-c", _BEGIN, json.dumps({**where, **more, "told": dict(self.told)})]


def become(place: Elsewhere, ends: Ends) -> NoReturn:
    """Let this process, a fenced child, go on as the interpreter of `place`.

    Raises:
        OSError: there is no such program.
    """
    for descriptor in (ends.orders, ends.messages):
        os.set_inheritable(descriptor, True)
    os.execv(place.python, place.words(f"{__name__}:go_on", ends=asdict(ends), answer=place.answer))


def call(name: str, *args: Any) -> Any:
    """Call the function `module:function`."""
    module, _, function = name.rpartition(":")
    return getattr(import_module(module), function)(*args)


def go_on(told: Mapping[str, Any]) -> NoReturn:
    """Answer orders in the interpreter that the child became."""
    from harness.isolation.subject import answer_orders

    faulthandler.enable(sys.stderr)

    def work(ends: Ends) -> None:
        answer_orders(ends, lambda: call(told["answer"], told["told"]))

    child.go_on(work, Ends(**{**told["ends"], "output": 1}))
