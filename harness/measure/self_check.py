"""Look at a bench before anything is judged on it: what can be read, that two builds are equal, that it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from harness.benches.bench import Bench, ends_with, shared
from harness.benches.codes import numbers_behind
from harness.benches.layer import Layer, experts_of, layer_of
from harness.benches.own import TOO_LARGE, OwnBench
from harness.benches.template import Template
from harness.errors import UserError, one_line
from harness.example import DTYPES
from harness.isolation.child import is_out_of_memory
from harness.measure.bench_summary import patterns
from harness.measure.compare import norm
from harness.measure.effective import dense_input, effective_weight, effective_weights, keep_dense, numbers_of
from harness.measure.tolerance import UNIT_ROUNDOFF

MOST_WEIGHTS = 30_000_000
_FEWEST = 4  # weights of a layer: a delta of fewer is in the span of any two
_OTHER_MATRIX = (
    "it computes with another matrix than its weight, as a factor makes it: to add to either is not the same"
)
_NOT_LINEAR = 1e-3  # of an answer: what rounding never makes
_BLUR = 0.05  # of an answer: what rounding the input to eight bits does
Refused = Callable[[str], UserError]


def look_at(bench: Bench, said: OwnBench, what: str) -> dict[str, Any]:
    """Return the facts of a bench, JSON and, under `tensors`, the weights of its layers in float64.

    Raises:
        UserError: it cannot be built, read or run, or says what is not so; one sentence that begins with `what`.
    """

    def refused(why: str) -> UserError:
        return UserError(f"{what}: {why}")

    try:
        return _facts(bench, said, refused)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise refused(TOO_LARGE) from error
        raise refused(f"it cannot be read: {one_line(error)}") from error


def _facts(bench: Bench, said: OwnBench, refused: Refused) -> dict[str, Any]:
    model = bench.base()
    _check_tensors(model, refused)
    fresh = digest(model)  # some layers repack their codes when they first run
    _check_repeats(bench, model, refused)
    layers, unread = _readable(model)
    layers |= _stacked(model, said, refused)
    targets = _targets(layers, model, said, unread, refused)
    _check_names(bench, said, layers, refused)
    tensors, dtypes = _weights(bench, layers, refused)
    return {
        "said": said.as_json(),
        "layers": {name: asdict(layer) for name, layer in layers.items()},
        "targets": targets,
        "shared": shared(model, layers),
        "unread": unread,
        "others": _other_parameters(model, layers),
        "owners": _owners(model),
        "twice": _twice(model),
        "uncalled": [name for name in bench.uncalled if name in layers],
        "dtypes": dtypes,
        "copies": not any(layer.codes for layer in layers.values()) and _copies(bench, model),
        "digest": fresh,
        "tensors": tensors,
    }


def _check_tensors(model: torch.nn.Module, refused: Refused) -> None:
    parameters = [*model.parameters(), *model.buffers()]
    if place := next((p.device for p in parameters if p.device.type != "cpu"), None):
        raise refused(f"its tensors are on {place}; build it on the CPU")
    if not any(p.is_floating_point() for p in parameters):
        kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        raise refused(f"its weights are {kinds}, not floating-point numbers" if kinds else "the model has no weights")
    if (number := sum(p.numel() for p in model.parameters())) > MOST_WEIGHTS:
        raise refused(f"the model has {number:,} weights, a bench at most {MOST_WEIGHTS:,}: give it a smaller config")


def _check_repeats(bench: Bench, model: torch.nn.Module, refused: Refused) -> None:
    other = bench.made()
    kept = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in kept for parameter in other.parameters()):
        raise refused("two calls of its function return the same layers: what one load changed is there for the next")
    again, state = other.state_dict(), model.state_dict()
    if again.keys() != state.keys():
        raise refused("two calls of its function build models with other layers")
    for name, value in state.items():
        if not _same(value, again[name]):
            why = "draw its weights with torch, Python's random or NumPy, which are seeded, and leave none undrawn"
            raise refused(f"two calls of its function differ in {name}: {why}")


def _same(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one == other
    first, second = numbers_behind(one), numbers_behind(other)
    if first.shape != second.shape:
        return False
    return bool(((first == second.to(first.dtype)) | (first.isnan() & second.isnan())).all())


def digest(model: torch.nn.Module) -> str:
    """Return what tells two builds apart."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, torch.Tensor):  # quantised layers keep words in their state too
            found.update(numbers_behind(value).double().contiguous().numpy().tobytes())
    return found.hexdigest()


def _readable(model: torch.nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers that answer as a matrix does, and why others are not read."""
    layers, unread = dict[str, Layer](), dict[str, str]()
    like = numbers_of(model)
    for name, module in model.named_modules():
        layer = layer_of(module)
        if layer is None or not name:  # a model that is one layer has no name for it
            continue
        blur, why = _looked_into(name, module, layer, like)
        if why:
            unread[name] = why
        else:
            layers[name] = replace(layer, blur=blur) if blur > _NOT_LINEAR else layer
    return layers, unread


def _stacked(model: torch.nn.Module, said: OwnBench, refused: Refused) -> dict[str, Layer]:
    found = experts_of(model, said.experts)
    for end in said.experts:
        if not any(ends_with(path, (end,)) for path in found):
            stacks = [name for name, value in model.named_parameters() if value.dim() == 3]
            what = f"these are: {patterns(stacks)}" if stacks else "the model has none"
            raise refused(f"experts: {end!r} is the end of no parameter of three dimensions; {what}")
    return found


def _looked_into(name: str, module: torch.nn.Module, layer: Layer, like: Tensor) -> tuple[float, str]:
    """Return the share of a dense answer that is not its matrix's, and why a layer is not read where it is none."""
    if layer.columns < 2 or layer.rows * layer.columns < _FEWEST:
        return 0.0, "it has too few weights to tell one LoRA from another"
    dense = dict[str, Tensor]()
    try:
        weight = effective_weight(module, layer, like)
        keep_dense(dense, name, module, layer, like)
    except Exception as error:
        return 0.0, f"it does not answer as a layer does ({one_line(error)[:80]})"
    if not bool(weight.isfinite().all()):
        return 0.0, "its weights are not finite"
    if not _is_its_weight(module, layer, weight):
        return 0.0, _OTHER_MATRIX
    x = dense_input(layer, like.dtype)
    if x is None or name not in dense:
        return 0.0, ""
    wanted = x.double() @ weight.T
    blur = norm(dense[name] - wanted) / norm(wanted) if norm(wanted) else 0.0
    return blur, "" if blur <= (_BLUR if layer.codes else _NOT_LINEAR) else "what it computes is no matrix"


def _is_its_weight(module: torch.nn.Module, layer: Layer, effective: Tensor) -> bool:
    """Whether the matrix that a layer multiplies by is the parameter it has, which is what a merge changes."""
    weight = module.weight
    if layer.codes or not isinstance(weight, Tensor) or weight.numel() != effective.numel():
        return True  # codes stand for other numbers
    own = weight.detach().double().flatten(1)
    own = own.T if layer.kind in ("transposed", "embedding") else own
    return own.shape == effective.shape and norm(own - effective) <= _NOT_LINEAR * norm(own)


def _targets(
    layers: Mapping[str, Layer],
    model: torch.nn.Module,
    said: OwnBench,
    unread: dict[str, str],
    refused: Refused,
) -> list[str]:
    """Return the layers that a LoRA may change; where nobody said which, all but those that share their weight."""
    if unread and not layers:
        name = next(iter(unread))
        raise refused(f"none of its layers can be read: {name}: {unread[name]}")
    if not layers:
        raise refused("it has no linear layer, convolution or embedding, with a name of its own")
    if said.targets is None:
        twice = shared(model, layers)
        return [name for name in layers if name not in twice and name not in twice.values()]
    for end in said.targets:
        if not any(ends_with(name, (end,)) for name in layers):
            kinds = (type(part).__name__ for name, part in model.named_modules() if ends_with(name, (end,)))
            if (kind := next(kinds, None)) and not any(ends_with(name, (end,)) for name in unread):
                raise refused(f"targets: {end!r} is a {kind} that no LoRA is measured on: it can only be looked at")
            why = next((why for name, why in unread.items() if ends_with(name, (end,))), None)
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise refused(f"targets: {end!r} is the end of no layer's path" + (f": {why}" if why else f" ({ends})"))
    return [name for name in layers if ends_with(name, (*said.targets, *said.experts))]


def _check_names(bench: Bench, said: OwnBench, layers: Mapping[str, Layer], refused: Refused) -> None:
    for end, parts in said.fused.items():
        found = [name for name in layers if ends_with(name, (end,))]
        if not found:
            raise refused(f"fused: {end!r} is the end of no layer's path")
        if (wrong := next((n for n in found if layers[n].rows != sum(parts.values())), None)) is not None:
            rows = f"{sum(parts.values())} rows, {wrong} has {layers[wrong].rows}"
            raise refused(f"fused: the projections of {end!r} have {rows}")
    named = [bench.file_name(name) for name in layers]
    if idle := next((words for words in said.names if not any(map(_has(words), layers))), None):
        raise refused(f"names: {idle!r} is in no layer's path")
    if (at := next((n for n in layers if not bench.file_name(n)), None)) is not None:
        raise refused(f"names: nothing would be left of the name of {at!r}")
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise refused(f"names: two layers would both be called {twice!r}")


def _has(words: str) -> Callable[[str], bool]:
    return lambda path: f".{words}." in f".{path}."


def _weights(bench: Bench, layers: Mapping[str, Layer], refused: Refused) -> tuple[dict[str, Tensor], list[str]]:
    """Return the layers' weights, with what each answers to nothing as last column, and the dtypes that it runs in.

    Of other dtypes than the first only those stand there that are not its own rounded.
    """
    tensors, raised = dict[str, Tensor](), dict[str, Exception]()
    for dtype in DTYPES:
        try:
            found = _in_dtype(bench, layers, dtype, refused)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raised[dtype] = error
            continue
        tensors |= {f"{dtype}:{name}": w for name, w in found.items() if not _is_rounded(w, tensors, name, dtype)}
    dtypes = [dtype for dtype in DTYPES if dtype not in raised]
    if (first := raised.get(DTYPES[0])) is not None:
        only = (
            f" in {DTYPES[0]}, not in {dtypes[0]}: give inputs no dtype, the default is the model's" if dtypes else ""
        )
        raise refused(f"its forward raises {one_line(first)}{only}") from first
    return tensors, dtypes


def _in_dtype(bench: Bench, layers: Mapping[str, Layer], dtype: str, refused: Refused) -> dict[str, Tensor]:
    model = bench.base(getattr(torch, dtype))
    like = numbers_of(model, getattr(torch, dtype))  # as a loaded model is asked
    modules = {name: layer for name, layer in layers.items() if layer.kind != "experts"}
    found = {
        name: effective_weight(model.get_submodule(name), layer, like, bias=True) for name, layer in modules.items()
    }
    rest = {name: layer for name, layer in layers.items() if name not in modules}
    found |= effective_weights(model, rest, bias=True)
    if bench.run is not None:
        first, second = bench.forward(model).double(), bench.forward(model).double()
        if dtype == "float32" and not (first.numel() and bool(first.isfinite().all())):
            raise refused("what its forward answers is empty or not finite")
        if not norm(first - second) <= 16 * UNIT_ROUNDOFF[dtype] * norm(first):
            raise refused("its forward answers the same input differently when it is run again")
    return found


def _is_rounded(weight: Tensor, tensors: Mapping[str, Tensor], name: str, dtype: str) -> bool:
    first = tensors.get(f"float32:{name}")
    return first is not None and torch.equal(first.to(getattr(torch, dtype)).double(), weight)


def _other_parameters(model: torch.nn.Module, layers: Mapping[str, Layer]) -> dict[str, list[int]]:
    """Return the shape of each parameter that belongs to no layer: they are only looked at for being changed."""
    named = ((name, list(value.shape)) for name, value in model.named_parameters() if name not in layers)
    return {name: shape for name, shape in named if layer_of(model.get_submodule(name.rpartition(".")[0])) is None}


def _owners(model: torch.nn.Module) -> dict[str, str]:
    """Return of which class the module is that a parameter belongs to."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    grouped = {name for name, module in model.named_modules() if getattr(module, "groups", 1) != 1}
    places = ((name, name.rpartition(".")[0]) for name, _ in model.named_parameters())
    return {name: f"grouped {kinds[at]}" if at in grouped else kinds[at] for name, at in places}


def _twice(model: torch.nn.Module) -> dict[str, str]:
    """Return the further names of modules that a model has under several, with the first."""
    first = {id(module): name for name, module in model.named_modules()}
    every = ((name, first[id(module)]) for name, module in model.named_modules(remove_duplicate=False))
    found = {name: own for name, own in every if name != own}
    return {name: own for name, own in found.items() if name.rpartition(".")[0] not in found}


def _copies(bench: Bench, model: torch.nn.Module) -> bool:
    """Whether a copy by way of pickling is the same model; else each is built anew."""
    try:
        copied = Template(model).build()
        same = all(_same(value, copied.state_dict()[name]) for name, value in model.state_dict().items())
        return same and torch.equal(bench.forward(copied), bench.forward(model))
    except Exception:
        return False


def known_facts(bench: Bench) -> dict[str, Any]:
    """Return of a bench of the table what `summary` tells: its layers are known to be read."""
    return {
        "layers": {name: asdict(layer) for name, layer in bench.layers.items()},
        "targets": list(bench.chosen),
        "shared": bench.shared,
        "unread": {},
        "others": _other_parameters(bench.base(), bench.layers),
        "owners": _owners(bench.base()),
        "twice": _twice(bench.base()),
        "uncalled": bench.uncalled,
        "dtypes": bench.dtypes,
        "said": {"runs": bench.run is not None},
    }
