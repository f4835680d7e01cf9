"""Server loaders: `serve:COMMAND` is started once and asked for each load in one line of JSON; docs/serve.md tells all.

Weights travel as safetensors files: the model's in, the merged ones out. A server says in its first line what it is.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.benches import bench_names, more_benches, own_benches
from harness.errors import LoaderSpecError
from harness.isolation.limits import TimeLimitExceeded
from harness.isolation.server import Server, ServerError, started
from harness.loaders.declaration import Declaration, declaration_from
from harness.loaders.exchange import OutputError, load_back, program_of, write_weights
from harness.loaders.outputs import read_output, write_inputs
from harness.loaders.protocol import SERVER, Load, Subject

if TYPE_CHECKING:
    import torch

PROTOCOL = 1
START_SECONDS, START_PATIENCE = 600.0, 300.0  # in all, and without a sign of life
_LONGEST = 3600.0  # of a load, where nobody limits it
_MODEL, _OUT = "model.safetensors", "merged.safetensors"
_SESSION = "_lora_harness_session"
_TEXT = ("name", "version")
_MOST_FRAMES, _MOST_TEXT = 20, 400

_sessions = itertools.count(1)


def serve_subject(spec: str) -> Subject:
    """Return the subject `spec`, as the first line of its server describes it.

    Raises:
        LoaderSpecError: it names no program, or what it starts does not say what it is.
    """
    hello = _hello(spec)
    declaration = _declaration(spec, hello)
    version, name = hello.get("version"), hello.get("name")
    if declaration.outputs:
        return Subject(spec, cast("Load", ServedOutputs(spec)), version, declaration, SERVER, name=name)
    served = Served(spec)
    unload = served.unload if hello.get("unload") else None
    set_strength = served.set_strength if hello.get("set_strength") else None
    declaration = replace(declaration, unload=unload, set_strength=set_strength)
    return Subject(spec, served, version, declaration, SERVER, name=name)


@cache
def _hello(spec: str) -> Mapping[str, Any]:
    """Start the server of `spec`, read what it says of itself and end it; once in this process."""
    words = program_of(spec)
    try:
        server = started(words)
        try:
            return _greeting(spec, server)
        finally:
            server.close()
    except ServerError as error:
        raise LoaderSpecError(f"{spec!r}: {error}") from error


def _greeting(spec: str, server: Server) -> Mapping[str, Any]:
    """Return the first line of a server.

    Raises:
        LoaderSpecError: it is another protocol, or says what no server does.
        ServerError: there is none.
    """
    hello = server.ask(None, START_SECONDS, patience=START_PATIENCE)
    if hello.get("protocol") != PROTOCOL:
        said = json.dumps(hello.get("protocol"))[:40]
        raise LoaderSpecError(f"{spec!r}: its first line says protocol {said}, this harness speaks {PROTOCOL}")
    wrong = [key for key in _TEXT if not isinstance(hello.get(key), str | None)]
    if wrong:
        raise LoaderSpecError(f"{spec!r}: {wrong[0]} in its first line is no text")
    return hello


def _declaration(spec: str, hello: Mapping[str, Any]) -> Declaration:
    from harness.variants import VARIANTS  # which needs torch

    facts = {key: value for key, value in hello.items() if key not in ("protocol", *_TEXT, "unload", "set_strength")}
    try:
        said = declaration_from(facts)
        _known("bench", frozenset(map(str, said.benches or ())), (*bench_names(), *more_benches(), *own_benches()))
        _known("variant", said.variants, VARIANTS)
    except LoaderSpecError as error:
        raise LoaderSpecError(f"{spec!r}: its first line: {error}") from error
    return said


def _known(kind: str, names: frozenset[str] | None, known: Collection[str]) -> None:
    unknown = sorted((names or frozenset()) - set(known))
    if unknown:
        raise LoaderSpecError(f"no {kind} is called {unknown[0]!r}; known are {', '.join(known)}")


class _Server:
    """A server, which starts in the process that first asks it and lives as long as that."""

    def __init__(self, spec: str, words: Sequence[str] | None = None) -> None:
        self.spec, self._words = spec, words  # words: the program, where the string does not name it
        self._server: Server | None = None
        self._number = 0

    def prepare(self) -> None:
        """Start the server now."""
        self._running()

    def is_over(self) -> bool:
        """Whether it was asked something and runs no longer."""
        return self._number > 0 and self._alive is None

    @property
    def _alive(self) -> Server | None:
        return self._server if self._server is not None and self._server.running else None

    def close(self) -> None:
        """End the server, if one runs."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _running(self) -> Server:
        if (server := self._alive) is None:
            self.close()
            server = self._server = started(self._words or program_of(self.spec))
            weakref.finalize(self, Server.close, server)
            try:
                _greeting(self.spec, server)
            except BaseException:
                self.close()
                raise
        return server

    def _ask(self, question: dict[str, Any]) -> str:
        """Return what the server printed while it did what it was asked.

        Raises:
            ServerError: it did not.
        """
        server = self._running()
        self._number += 1
        try:
            answer = server.ask({"protocol": PROTOCOL, "id": self._number, **question}, _LONGEST)
            said = server.hear()
            _raise_what_it_says(answer, self._number, said)
        except TimeLimitExceeded:  # of the call: say whether the server is alive
            late = server.lateness()
            self.close()
            raise late from None
        except BaseException as error:
            if not (isinstance(error, ServerError) and error.answered):
                self.close()  # dead or confused: the next load gets a new one
            raise
        return said


class Served(_Server):
    """The loader behind a server."""

    def __call__(self, model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
        """Have a LoRA loaded into `model`."""
        return self._change(model, {"op": "load", "lora": str(lora), "strength": float(strength)})

    def unload(self, model: torch.nn.Module) -> None:
        """Have the last load undone."""
        self._change(model, {"op": "unload"})

    def set_strength(self, model: torch.nn.Module, strength: float) -> None:
        """Have the strength of the last load changed."""
        self._change(model, {"op": "set_strength", "strength": float(strength)})

    def _change(self, model: torch.nn.Module, order: Mapping[str, Any]) -> torch.nn.Module:
        with tempfile.TemporaryDirectory(prefix="lora-harness-serve-") as folder:
            base, out = Path(folder) / _MODEL, Path(folder) / _OUT
            write_weights(model, base)
            said = self._ask({**order, "model": str(base), "out": str(out), **_facts(model)})
            try:
                load_back(model, base, out)
            except OutputError as error:
                raise ServerError(str(error), printed=said) from error
        if said:
            print(said, file=sys.stderr)  # who listens to loaders hears this one too
        return model


class ServedOutputs(_Server):
    """The engine behind a server that gives outputs, no weights."""

    def __call__(self, base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Have the model in `base` with the LoRA on it answer `inputs`."""
        with tempfile.TemporaryDirectory(prefix="lora-harness-serve-") as folder:
            given, out = Path(folder) / "input.safetensors", Path(folder) / "output.safetensors"
            write_inputs(inputs, given)
            order = {"op": "outputs", "base": str(base), "lora": str(lora), "strength": float(strength)}
            said = self._ask({**order, "input": str(given), "out": str(out)})
            try:
                return read_output(out)
            except OutputError as error:
                raise ServerError(str(error), printed=said) from error


def _facts(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a server can build the model from, and which of the models of this run it is."""
    kind = type(model)
    session = vars(model).setdefault(_SESSION, next(_sessions))
    layers = {n: type(m).__name__ for n, m in model.named_modules() if n and getattr(m, "weight", None) is not None}
    return {
        "session": session,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "config": _config(model),
        "layers": layers,
    }


def _config(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", lambda: config)
    try:
        return json.loads(json.dumps(to_dict()))
    except (TypeError, ValueError):
        return None


def _raise_what_it_says(answer: Mapping[str, Any], number: int, printed: str) -> None:
    """Raise what the answer to the question `number` says went wrong."""
    said = {key: answer[key] for key in ("done", "refused", "error") if key in answer}
    if answer.get("id") != number or len(said) != 1 or said.get("done", True) is not True:
        shown = json.dumps(answer)[:120]
        raise ServerError(
            f"the server answered {shown}, which is neither done, refused nor error for id {number}", printed=printed
        )
    for kind, text in said.items():
        if kind != "done":
            lines = str(text).strip().splitlines() or [kind]
            frames = [str(line)[:_MOST_TEXT] for line in list(answer.get("frames") or ())[:_MOST_FRAMES]]
            raise ServerError(lines[-1], refused=kind == "refused", answered=True, frames=frames, printed=printed)
