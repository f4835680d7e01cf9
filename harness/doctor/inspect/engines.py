"""What a serving engine would do with a LoRA: refuse it, need an option, or leave out a part; by rules as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import LoraAdapter
from harness.files.architectures import read_toml
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.text import first_of, parse_json, printable
from harness.verdict.file_record import Hazard

_DATA = Path(__file__).with_name("engines.toml")
_MOST_TOKENS_BYTES = 8_000_000
Engine = Mapping[str, Any]


@cache
def engines() -> dict[str, Engine]:
    """Return the engines that are known, by name."""
    return read_toml(_DATA)


def engine_hazards(adapter: LoraAdapter, name: str, max_rank: int | None = None) -> Iterator[Hazard]:
    """Yield LH724 where the engine `name` refuses the adapter, LH725 where it needs an option or leaves out a part.

    `max_rank` is the limit that the server was started with; without it the engine's own counts.

    Raises:
        UserError: no engine of that name is known.
    """
    if name not in engines():
        raise UserError(f"engine={name!r} is unknown, known are {', '.join(engines())}")
    engine = engines()[name]
    if adapter.file.path.name != WEIGHTS_NAME or not (adapter.file.path.parent / CONFIG_NAME).exists():
        what = f"it loads folders with {WEIGHTS_NAME} and {CONFIG_NAME}"
        yield _hazard("LH724", engine, what, "how adapters are opened")
        return
    for rule in engine["rules"]:
        if _holds(rule, adapter.config):
            code, what = ("LH724", rule["refuses"]) if "refuses" in rule else ("LH725", rule["leaves_out"])
            shown = printable(adapter.config.get(rule["field"]), 60)
            yield _hazard(code, engine, f"{rule['field']} is {shown}: {what}", rule["where"])
    yield from (*_rank(adapter, engine, max_rank), *_names(adapter, engine), *_together(adapter, engine))
    yield from _added_tokens(adapter, engine)


def _hazard(code: str, engine: Engine, what: str, where: str) -> Hazard:
    verb = "refuses it" if code == "LH724" else "takes it with a reservation"
    return Hazard(code=code, what=f"{engine['title']} {engine['version']} ({engine['date']}) {verb}: {what} [{where}]")


def _holds(rule: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    value = config.get(rule["field"])
    if rule.get("missing"):
        return rule["field"] not in config
    if rule.get("set"):
        return bool(value)
    if value is None or (rule.get("text_only") and not isinstance(value, str)):
        return False
    values = value if isinstance(value, list) else [value]
    return any(one not in rule["not_in"] for one in values)


def _rank(adapter: LoraAdapter, engine: Engine, given: int | None) -> Iterator[Hazard]:
    """The largest rank counts: of the configuration's r and of what rank_pattern says."""
    rank, limit = _largest_rank(adapter), given or engine.get("max_rank")
    if limit is None or rank <= limit:
        return
    able = option_for(adapter, engine) if given is None else ""
    if able:
        yield _hazard("LH725", engine, f"rank {rank} needs {able} (without it {limit})", engine["rank_where"])
    else:
        most = limit if given is not None else max(engine["ranks"])
        yield _hazard("LH724", engine, f"rank {rank} is above {engine['option']} {most}", engine["rank_where"])


def option_for(adapter: LoraAdapter, engine: Engine) -> str:
    """Return the option that an engine has to be started with for the ranks of a file; empty where none helps."""
    rank = _largest_rank(adapter)
    if rank <= engine.get("max_rank", rank):
        return ""
    return next((f"{engine['option']} {size}" for size in engine.get("ranks", ()) if size >= rank), "")


def _largest_rank(adapter: LoraAdapter) -> int:
    patterns = adapter.config.get("rank_pattern")
    named = [adapter.config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max([rank for rank in named if isinstance(rank, int)] or [m.rank for m in adapter.modules.values()] or [0])


def _names(adapter: LoraAdapter, engine: Engine) -> Iterator[Hazard]:
    ends = tuple(f".{end}" for end in engine.get("names", ()))
    odd = [key for key in adapter.file.keys if ends and not key.endswith(ends)]
    if odd:
        what = f"{len(odd)} tensors have names that it does not take ({first_of(odd)})"
        yield _hazard("LH724", engine, what, engine["names_where"])


def _together(adapter: LoraAdapter, engine: Engine) -> Iterator[Hazard]:
    """Some layers are stacked when they are loaded, so that one of them needs the other."""
    for first, second in engine.get("together", ()):
        names = {module.name for module in adapter.modules.values()}
        alone = [n for n in names if n.endswith(f".{first}") and f"{n.removesuffix(first)}{second}" not in names]
        if alone:
            what = f"{first} without {second} in {first_of(sorted(alone))}: it stacks them"
            yield _hazard("LH724", engine, what, engine["together_where"])


def _added_tokens(adapter: LoraAdapter, engine: Engine) -> Iterator[Hazard]:
    file = adapter.file.path.parent / "added_tokens.json"
    if "added_tokens" not in engine or not file.is_file() or file.stat().st_size > _MOST_TOKENS_BYTES:
        return
    try:
        tokens = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(tokens, dict) and tokens:
        what = f"{engine['added_tokens']}; {len(tokens)} are named, which may all be the base's"
        yield _hazard("LH725", engine, what, engine["added_tokens_where"])
