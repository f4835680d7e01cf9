"""Benches of other people: built only where the loader runs; a child looks at them first and says what they are.

What a string names, or a function, becomes a `Bench` whose layers and weights are known here, and whose model is built
there.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import Bench, Layer, add_bench, bench_names, get_bench, more_benches, own_benches
from harness.benches.own import OwnBench, bench_of, declare_as, declared, undisturbed
from harness.benches.quantise import check_scheme, quantised
from harness.errors import UserError, one_line
from harness.isolation.facts import facts_apart
from harness.isolation.limits import Limits
from harness.isolation.processes import can_fork
from harness.loaders.source import A_BENCH, import_callable, is_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENTRY_POINTS = "lora_harness.benches"
BUILD_SECONDS = 100.0  # for what it imports, two builds and the look at its layers
Make = Callable[[], Any]
Which = str | Make
_LIBRARIES = ("torch", "diffusers", "transformers")  # their modules are imported here too, once for all that follow


@dataclass(frozen=True, eq=False)
class KnownBench(Bench):
    """A bench that was looked at: what is known of its layers needs no model."""

    prepare: Callable[[], object] = lambda: None  # imports what builds it
    said_as: str = ""  # on the command line, where it is not `--bench` and its spec
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """The layers that can be read, by path."""
        return {name: _layer(fields) for name, fields in self.facts["layers"].items()}

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The layers that a LoRA may change, by path in the model."""
        return tuple(self.facts["targets"])

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The layers that share the weight of another one, with that one."""
        return dict(self.facts["shared"])

    @cached_property
    def uncalled(self) -> tuple[str, ...]:
        """The layers that one forward does not call."""
        return tuple(self.facts["uncalled"])

    @property
    def option(self) -> str:
        """What names it on the command line."""
        return self.said_as or super().option

    def known_weights(self, dtype: str) -> dict[str, Tensor] | None:
        """Return the layers' weights, with a column for the bias, in float64."""
        import torch

        tensors: Mapping[str, Tensor] = self.facts["tensors"]
        first = {name: tensors[f"float32:{name}"] for name in self.facts["layers"]}
        rounded = {name: weight.to(getattr(torch, dtype)).double() for name, weight in first.items()}
        return {name: tensors.get(f"{dtype}:{name}", weight) for name, weight in rounded.items()}

    def measures(self, tried: Collection[str]) -> Iterator[str]:
        """Yield what is measured of it, and what is not, a sentence each."""
        from harness.measure.bench_summary import summary

        view = self.view
        return summary(self.facts, {n: view.layers[n].kind for n in view.lora_layers if n not in tried})

    def made(self) -> torch.nn.Module:
        """Return a model that its function built.

        Raises:
            UserError: it is another one than in the process that looked at it.
        """
        from harness.measure.self_check import digest

        self.prepare()  # what an import draws must not be drawn after the seed
        model = super().made()
        if self.facts["digest"] != digest(model):
            raise UserError(f"bench {self.name}: its function builds another model in another process")
        return model


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _layer(fields: Mapping[str, Any]) -> Layer:
    known: dict[str, Any] = {name: _frozen(value) for name, value in fields.items()}
    return Layer(**known)


def bench_name(which: Which, *, model: bool = False, quantise: str | None = None) -> str:
    """Return the name of a bench, which it can be asked for by from now on; one of one's own is looked at first.

    `which` is the name of one, `package.module:function`, `path/to/file.py:function`, or the function itself. With
    `model` the function declares nothing: every layer of what it builds takes a LoRA. `quantise` says to which codes
    its linear layers that take one are rounded; that is another bench.

    Raises:
        UserError: no such bench, or one that cannot be used, in a sentence.
    """
    if quantise:
        return _of_codes(get_bench(bench_name(which, model=model)), quantise)
    if not isinstance(which, str):
        return _of_function(which, model=model)
    if not model and which in (*bench_names(), *more_benches(), *own_benches()):
        return which
    for name in own_benches():
        if get_bench(name).spec == which:
            return name
    point = next((each for each in metadata.entry_points(group=ENTRY_POINTS) if each.name == which), None)
    if point is None and ":" not in which:
        if is_file(which):
            raise UserError(f"{which!r} names a file but no function; write {which}:make when `make` is its name")
        return get_bench(which).name  # says which there are
    find = partial(_loaded, point) if point else partial(import_callable, which, A_BENCH)
    return _add(which, find, _looked_at(which, find, model=model), model=model)


def _loaded(point: metadata.EntryPoint) -> Make:
    try:
        make: Make = point.load()
        return make
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"bench {point.name}: importing {point.value} raises {one_line(error)}") from error


def _of_codes(bench: Bench, scheme: str) -> str:
    """Return the name of a bench with its linear layers quantised, after looking at it."""
    check_scheme(scheme)
    spec, chosen = f"{bench.spec or bench.name}+{scheme}", frozenset(bench.chosen)
    fused = {
        end: {str(n): rows for n, rows in enumerate(parts)} for end, parts in bench.fused if not isinstance(parts, int)
    }
    prepare = getattr(bench, "prepare", lambda: None)

    def find() -> Make:
        prepare()
        build = quantised(bench.make, scheme, chosen.__contains__)
        name = f"{bench.name}+{scheme}"
        codes = OwnBench(name, _modules(bench), bench.run, fused, bench.component, bench.names, bench.experts)
        return declare_as(codes)(build)

    name = f"{bench.name}+{scheme}"
    if name in own_benches():
        return name
    return _add(
        spec, find, _looked_at(spec, find, model=False), model=False, option=f"{bench.option} --quantise {scheme}"
    )


def _modules(bench: Bench) -> tuple[str, ...]:
    return tuple(name for name in bench.chosen if bench.layers[name].kind != "experts")


_FUNCTIONS: dict[str, Make] = {}


def _of_function(make: Make, *, model: bool) -> str:
    spec = spec_of(make)
    said = _said(make, spec, model=model)
    if _FUNCTIONS.get(said.name) is not make:
        _add(spec, lambda: make, _looked_at(spec, lambda: make, model=model), model=model)
        _FUNCTIONS[said.name] = make
    return said.name


def _said(make: Make, spec: str, *, model: bool) -> OwnBench:
    """Return what a function declares.

    Raises:
        UserError: it is no bench.
    """
    if not callable(make):
        raise UserError(f"{make!r} is no bench: give a function under @bench, or a string that names one")
    said = declared(make)
    if said is None and not model:
        raise UserError(f"{spec} is no bench: put @bench(name) over it, or say --model {spec} for all its layers")
    return said or OwnBench(spec)


def _add(spec: str, find: Callable[[], Make], facts: Mapping[str, Any], *, model: bool, option: str = "") -> str:
    later = _Lazy(find, spec, model)
    said = OwnBench(**{name: _frozen(value) for name, value in facts["said"].items() if name != "runs"})
    plain = bench_of(said, later.make, spec)
    run = later.run if facts["said"]["runs"] else None
    split = partial(said.split, {name: _layer(fields) for name, fields in facts["layers"].items()})
    add_bench(
        KnownBench(
            plain.name,
            plain.seed,
            plain.make,
            plain.targets,
            run,
            plain.fused,
            plain.component,
            split if said.fused else None,
            names=plain.names,
            spec=spec,
            experts=plain.experts,
            dtypes=tuple(facts["dtypes"]),
            copies=facts["copies"],
            prepare=partial(_found, later),
            said_as=option or (f"--model {shlex.quote(spec)}" if model and said.name == spec else ""),
            facts=facts,
        )
    )
    return said.name


@dataclass(frozen=True)
class _Lazy:
    """The function of a bench, found where it is first called."""

    find: Callable[[], Make]
    spec: str
    model: bool

    def make(self) -> Any:
        return _found(self)()

    def run(self, model: Any, noise: Any) -> Any:
        make = _found(self)
        own = bench_of(_said(make, self.spec, model=self.model), make, self.spec)
        assert own.run is not None
        return own.run(model, noise)


@cache
def _found(later: _Lazy) -> Make:
    with undisturbed():
        return later.find()


def _looked_at(spec: str, find: Callable[[], Make], *, model: bool) -> dict[str, Any]:
    """Have a child import and build a bench, and return its facts.

    Raises:
        UserError: it cannot be used, or ends its process.
    """
    gather = partial(_facts, spec, find, model)
    limit = Limits().memory
    what = (f"bench {spec}", "building", "built")
    facts = facts_apart(gather, *what, memory_limit=limit, seconds=BUILD_SECONDS) if can_fork() else gather()
    if "error" in facts:
        raise UserError(facts["error"])
    for name in facts["modules"]:
        with contextlib.suppress(Exception):
            import_module(name)
    return facts


def _facts(spec: str, find: Callable[[], Make], model: bool) -> dict[str, Any]:
    from harness.measure.self_check import look_at

    before = set(sys.modules)
    try:
        with undisturbed():
            make = find()
        said = _said(make, spec, model=model)
        bench = replace(bench_of(said, make, spec), copies=False)
        facts = look_at(bench, said, f"bench {spec}")
    except UserError as error:
        return {"error": str(error)}
    new = [name for name in sys.modules if name not in before and name.partition(".")[0] in _LIBRARIES]
    return {**facts, "modules": new}


def spec_of(make: Make) -> str:
    """Return the string that names a function on a command line as well as one can be given."""
    module, name = getattr(make, "__module__", "") or "", getattr(make, "__qualname__", type(make).__qualname__)
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or ("." in module and not module.startswith("_lora_harness_file_")):
        return f"{module}:{name}" if module else name
    path = Path(file)
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return f"{path}:{name}"


def installed_benches() -> Iterable[str]:
    """Return the names of the benches that other packages register."""
    taken = (*bench_names(), *more_benches())
    return [point.name for point in metadata.entry_points(group=ENTRY_POINTS) if point.name not in taken]
