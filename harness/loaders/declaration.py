"""What a loader declares about itself: formats, benches, variants, what undoes a load, what it does not take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from harness.benches.own import declared
from harness.errors import LoaderSpecError
from harness.example import DTYPES
from harness.files.formats import FORMATS

if TYPE_CHECKING:
    import torch

_ATTRIBUTE = "__lora_harness__"


@dataclass(frozen=True)
class Declaration:
    """What a loader says it can do; None stands for every core format and bench, and for plain LoRA.

    `benches` are names, and functions under `@bench`.
    `unsupported` takes cells out: names of a format, a bench, a variant or several -> the reason, in one clause.
    Without a `strength_argument` it takes no strength. `uniform`: "rank", "alpha" or both must be the same in all
    modules of a file. `modules`: a regular expression that is found in the names of the modules that it takes.
    `quantises`: it rounds the base weights, so that its own load at strength 0 is what a load is compared with.
    `outputs`: it gives what a model answers instead of a model (see `Outputs`). `also` are benches that it is checked
    on when they are asked for. `dtypes` are those of the models that it takes, `file_dtypes` of the files; empty for
    all. `gpu`: it needs one; no other loader finds any.
    """

    formats: frozenset[str] | None = None
    benches: frozenset[str | Callable[[], object]] | None = None
    variants: frozenset[str] | None = None
    unload: Callable[[torch.nn.Module], object] | None = None
    set_strength: Callable[[torch.nn.Module, float], object] | None = None
    strength_argument: str | None = "strength"
    unsupported: Mapping[tuple[str, ...], str] = field(default_factory=dict, hash=False)
    uniform: frozenset[str] = frozenset()
    modules: str | None = None
    quantises: bool = False
    also: frozenset[str] = frozenset()
    outputs: bool = False
    dtypes: frozenset[str] = frozenset()
    file_dtypes: frozenset[str] = frozenset()
    gpu: bool = False


NOTHING = Declaration()
"""What a loader declares that says nothing."""
F = TypeVar("F", bound=Callable[..., object])


def loader(
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[str | Callable[[], object]] | None = None,
    variants: Iterable[str] | None = None,
    unload: Callable[[torch.nn.Module], object] | None = None,
    set_strength: Callable[[torch.nn.Module, float], object] | None = None,
    strength_argument: str | None = "strength",
    unsupported: Mapping[tuple[str, ...], str] | None = None,
    uniform: Iterable[str] = (),
    modules: str | None = None,
    quantises: bool = False,
    also: Iterable[str] = (),
    outputs: bool = False,
    dtypes: Iterable[str] = (),
    file_dtypes: Iterable[str] = (),
    gpu: bool = False,
) -> Callable[[F], F]:
    """Declare what a loader can do; the decorated function is returned as it is.

    `unload(model)` undoes the last load, or all; `set_strength(model, strength)` changes the strength of what was
    loaded last without loading it again. `strength_argument` is the keyword under which users of this loader pass the
    strength; a function without a `strength` keyword is called with it. `unsupported` maps names of format, bench or
    a variant that do not go together, such as ("kohya", "flux"), to a reason. `benches` may hold functions under
    `@bench`, as `check --bench` takes them by `file.py:function`.

    For loaders that do less: `strength_argument=None` takes no strength; `dtypes={"float32"}` takes models of these
    dtypes, `file_dtypes` files of those; `uniform={"rank", "alpha"}` takes files in which every module has the same
    one; `modules` is a regular expression found in the names of the modules that it takes; `quantises=True` rounds the
    base weights, so its own load at strength 0 is the baseline. On the benches of `also` it is checked when they are
    asked for. `gpu=True` needs a GPU: loaders are checked on the processor and find none otherwise, so that a check
    is the same everywhere. For engines that hold no weights to read: `outputs=True`, and a function
    `(base, lora, *, strength, inputs)` that returns a tensor.

    >>> @loader(formats={"peft", "kohya"}, strength_argument="alpha")
    ... def load(model, lora, *, strength=1.0): ...
    """
    declaration = Declaration(
        _some("formats", formats),
        _some("benches", benches),
        _some("variants", variants),
        unload,
        set_strength,
        strength_argument,
        dict(unsupported or {}),
        _set("uniform", uniform),
        modules,
        quantises,
        _set("also", also),
        outputs,
        _set("dtypes", dtypes),
        _set("file_dtypes", file_dtypes),
        gpu,
    )
    _check(declaration)

    def declare(function: F) -> F:
        setattr(function, _ATTRIBUTE, declaration)
        return function

    return declare


def _set(key: str, names: Any) -> frozenset[Any]:
    if isinstance(names, str):
        raise LoaderSpecError(f"{key}={names!r}: give a set of names, {{{names!r}}}")
    try:
        return frozenset(names)
    except TypeError:
        raise LoaderSpecError(f"{key}={names!r} is no set of names") from None


def _some(key: str, names: Any) -> frozenset[Any] | None:
    found = None if names is None else _set(key, names)
    if found is not None and not found:
        raise LoaderSpecError(f"{key} is empty: leave it out for the usual ones")
    return found


FACTS = (
    "formats",
    "benches",
    "variants",
    "strength_argument",
    "uniform",
    "modules",
    "quantises",
    "also",
    "unsupported",
    "outputs",
    "dtypes",
    "file_dtypes",
    "gpu",
)
"""What a loader in another process can say of itself in JSON, of the fields of a `Declaration`."""


def declaration_from(facts: Mapping[str, Any]) -> Declaration:
    """Return what a loader in another process declares, given as JSON under some of the names in `FACTS`.

    `unsupported` is a list of pairs: a list of names, and the reason.

    Raises:
        LoaderSpecError: a name that is none of these, or a value that cannot be meant.
    """
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise LoaderSpecError(f"{unknown[0]!r} is nothing that a loader declares; that is {', '.join(FACTS)}")
    places = ("formats", "benches", "variants")
    formats, benches, variants = (None if facts.get(k) is None else _names(k, facts[k]) for k in places)
    said = Declaration(
        formats,
        benches,
        variants,
        strength_argument=facts.get("strength_argument", "strength"),
        unsupported=_reasons(facts.get("unsupported") or []),
        uniform=_names("uniform", facts.get("uniform") or []),
        modules=facts.get("modules"),
        quantises=facts.get("quantises") or False,
        also=_names("also", facts.get("also") or []),
        outputs=facts.get("outputs") or False,
        dtypes=_names("dtypes", facts.get("dtypes") or []),
        file_dtypes=_names("file_dtypes", facts.get("file_dtypes") or []),
        gpu=facts.get("gpu") or False,
    )
    _check(said)
    return said


def _names(key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LoaderSpecError(f"{key} must be a list of names")
    return frozenset(value)


def _reasons(value: Any) -> dict[tuple[str, ...], str]:
    try:
        pairs = [(tuple(map(str, names)), str(reason)) for names, reason in value]
    except (TypeError, ValueError):
        raise LoaderSpecError("unsupported must be a list of pairs: a list of names, and the reason") from None
    return dict(pairs)


def _check(said: Declaration) -> None:
    """Refuse what cannot be meant.

    Raises:
        LoaderSpecError: a regular expression that is none, something else than rank and alpha, no baseline, a format
            or dtype that there is not, what is no function, text or pair.
    """
    _check_kinds(said)
    if unknown := sorted(set(map(str, said.formats or ())) - set(FORMATS)):
        raise LoaderSpecError(f"no format is called {unknown[0]!r}; known are {', '.join(FORMATS)}")
    if strange := sorted((said.dtypes | said.file_dtypes) - set(DTYPES)):
        raise LoaderSpecError(f"dtypes={strange[0]!r}: models and files are of {', '.join(DTYPES)}")
    if wrong := said.uniform - {"rank", "alpha"}:
        raise LoaderSpecError(f"uniform={sorted(wrong)[0]!r}: only rank and alpha can be uniform")
    for bench in said.benches or ():
        if not isinstance(bench, str) and declared(bench) is None:
            raise LoaderSpecError(f"benches: {bench!r} is no bench: it is not a name, nor a function under @bench")
    if said.quantises and said.strength_argument is None:
        raise LoaderSpecError("quantises=True needs a strength_argument: the load at strength 0 is the baseline")
    try:
        re.compile(said.modules or "")
    except re.error as error:
        raise LoaderSpecError(f"modules={said.modules!r} is no regular expression: {error}") from None


def _check_kinds(said: Declaration) -> None:
    for key in ("unload", "set_strength"):
        if not (getattr(said, key) is None or callable(getattr(said, key))):
            raise LoaderSpecError(f"{key}={getattr(said, key)!r} is no function")
    for key in ("strength_argument", "modules"):
        if (value := getattr(said, key)) is not None and (not isinstance(value, str) or not value):
            raise LoaderSpecError(f"{key}={value!r} is no text; leave it out, or None")
    for key in ("quantises", "outputs", "gpu"):
        if not isinstance(getattr(said, key), bool):
            raise LoaderSpecError(f"{key}={getattr(said, key)!r} is neither True nor False")
    for names in said.unsupported:
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise LoaderSpecError(f"unsupported: {names!r} is no tuple of names, such as ('kohya', 'flux')")


def declaration_of(function: Callable[..., object]) -> Declaration:
    """Return what `function` declared with `@loader`, or the empty declaration."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else NOTHING
