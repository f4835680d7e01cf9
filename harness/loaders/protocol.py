"""What a loader is: one function that puts a LoRA file into a model, and what it declares about itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from harness.benches import bench_names, own_benches
from harness.benches.own import declared
from harness.errors import LoaderSpecError
from harness.example import DTYPES
from harness.files.formats import FORMATS
from harness.isolation.elsewhere import Elsewhere

if TYPE_CHECKING:
    import torch

CORE_FORMATS = ("peft", "kohya", "diffusers", "diffsynth")
CORE_BENCHES = ("qwen-image", "qwen-image-fused")
CORE_VARIANTS = ("lora",)
IMPLIED_BENCHES = {"qwen-image-deep": "qwen-image"}
"""Benches that who declares another is tried on too, in one format: the same model with another number of blocks."""
OUTPUT_BENCHES, OUTPUT_FORMATS = ("tiny-llama",), ("peft",)
"""What an engine that gives only outputs is tried on where nobody says."""
EVERY_BENCH = tuple(name for name in bench_names() if name not in IMPLIED_BENCHES and name not in OUTPUT_BENCHES)
_ATTRIBUTE = "__lora_harness__"


class Load(Protocol):
    """Put the LoRA file `lora` into `model`, in place or returning a new model.

    `lora` is the folder for the `peft` format and the `.safetensors` file for every other one;
    `strength` is the number a user passes (1.0 reproduces the training when the loader is right).
    """

    def __call__(self, model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module | None:
        """Return the model to use, or None when `model` was changed in place."""


class Outputs(Protocol):
    """Answer `inputs` with the model in the folder `base` (config.json, model.safetensors) and the LoRA `lora` on it.

    `inputs` are what the bench's model is called with, by argument (`input_ids: [1, 6]`); the answer is what the model
    gives, such as logits `[1, 6, 40]`.
    """

    def __call__(self, base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output."""


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
    all.
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


@dataclass(frozen=True)
class Defaults:
    """What a subject gets when nobody says: random examples per cell, and seconds for one call of it.

    `slow`: a call takes seconds, so that it is told how long all of them will take.
    """

    examples: int = 200
    seconds: float = 20.0
    slow: bool = False

    def examples_in(self, *, quick: bool) -> int:
        """Return the number of examples per cell, at most 30 in a `quick` run."""
        return min(QUICK_EXAMPLES, self.examples) if quick else self.examples


QUICK_EXAMPLES = 30
FUNCTION = Defaults()
OUTPUTS = Defaults(examples=10, seconds=120.0)
COMMAND = Defaults(examples=10, seconds=120.0, slow=True)  # it starts a process each time
SERVER = Defaults(seconds=60.0)


@dataclass(frozen=True)
class Subject:
    """A loader ready to be tested: `spec` is the string that names it everywhere, `name` how it is shown instead.

    The code of one that is `elsewhere` runs in another interpreter, or among other packages. One that is named with a
    release or a checkout is `known_as` the live loader that it is a release of.
    """

    spec: str
    load: Load
    version: str | None = None
    declaration: Declaration = Declaration()
    defaults: Defaults = FUNCTION
    name: str | None = None
    elsewhere: Elsewhere | None = field(default=None, compare=False)
    known_as: str | None = None

    @property
    def title(self) -> str:
        """What it is called in reports."""
        return self.name or self.spec

    @property
    def outputs(self) -> Outputs | None:
        """Its `load` as what it is where it gives outputs, no models; else None."""
        return cast("Outputs", self.load) if self.declaration.outputs else None

    def prepare(self) -> None:
        """Import, or start, what runs only where the loader does."""
        getattr(self.load, "prepare", lambda: None)()

    def is_over(self) -> bool:
        """Whether what `prepare` started has ended, so that the next call would have to start it again."""
        return bool(getattr(self.load, "is_over", lambda: False)())

    def close(self) -> None:
        """End what it started in this process."""
        getattr(self.load, "close", lambda: None)()

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats it declares, the core formats first and in their own order."""
        return _ordered(self.declaration.formats, OUTPUT_FORMATS if self.declaration.outputs else CORE_FORMATS)

    @property
    def benches(self) -> tuple[str, ...]:
        """The names of the benches it declares, the core benches first and in their own order."""
        said = self.declaration.benches
        names = None if said is None else frozenset(map(str, said))
        return _ordered(names, OUTPUT_BENCHES if self.declaration.outputs else CORE_BENCHES)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants it declares, plain LoRA first."""
        return _ordered(self.declaration.variants, CORE_VARIANTS)

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """The (format, bench) pairs it declares for plain LoRA, in the order of `formats`, then `benches`."""
        pairs = ((form, bench) for form in self.formats for bench in self.benches)
        return tuple(pair for pair in pairs if self.unsupported(*pair) is None)

    def unsupported(self, form: str, bench: str, variant: str = "lora") -> str | None:
        """Return why this loader does not claim the cell, or None when it does, or declares nothing about it."""
        said = self.declaration
        named = bench in (said.benches or ())
        cell = {"format": form, "bench": bench if named else IMPLIED_BENCHES.get(bench, bench), "variant": variant}
        open_to = bench in own_benches() or bench in said.also  # who asks for a bench of his own declares it so
        benches = None if open_to else said.benches
        for (kind, name), names in zip(cell.items(), (said.formats, benches, said.variants), strict=True):
            if names is not None and name not in names:
                return f"{self.spec} does not declare the {kind} {name}"
        return next((why for names, why in said.unsupported.items() if set(names) <= set(cell.values())), None)

    @property
    def strength_argument(self) -> str | None:
        """The name under which users of this loader pass the strength (`alpha`, `scale`, ...), None where none can."""
        return self.declaration.strength_argument


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
    asked for. For engines that hold no weights to read: `outputs=True`, and a function
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
        strength_argument=_text("strength_argument", facts.get("strength_argument", "strength")),
        unsupported=_reasons(facts.get("unsupported") or []),
        uniform=_names("uniform", facts.get("uniform") or []),
        modules=_text("modules", facts.get("modules")),
        quantises=facts.get("quantises") or False,
        also=_names("also", facts.get("also") or []),
        outputs=facts.get("outputs") or False,
        dtypes=_names("dtypes", facts.get("dtypes") or []),
        file_dtypes=_names("file_dtypes", facts.get("file_dtypes") or []),
    )
    _check(said)
    return said


def _names(key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LoaderSpecError(f"{key} must be a list of names")
    return frozenset(value)


def _text(key: str, value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise LoaderSpecError(f"{key} must be text or null")
    return value


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
    for key in ("quantises", "outputs"):
        if not isinstance(getattr(said, key), bool):
            raise LoaderSpecError(f"{key}={getattr(said, key)!r} is neither True nor False")
    for names in said.unsupported:
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise LoaderSpecError(f"unsupported: {names!r} is no tuple of names, such as ('kohya', 'flux')")


def declaration_of(function: Callable[..., object]) -> Declaration:
    """Return what `function` declared with `@loader`, or the empty declaration."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else Declaration()


def _ordered(declared: frozenset[str] | None, core: tuple[str, ...]) -> tuple[str, ...]:
    if declared is None:
        return core
    return tuple(name for name in core if name in declared) + tuple(sorted(declared - set(core)))
