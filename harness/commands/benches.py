"""`lora-harness benches`: the models that loaders are checked on, and what is measured of one of your own."""

from __future__ import annotations

import json
from typing import Any

import click

from harness.commands import options as shared
from harness.text import count, on_one_line, printable


@click.command(epilog="\b\nExamples:\n  lora-harness benches\n  lora-harness benches --bench my_model.py:my_phi3")
@shared.bench_options
@shared.json_option
def command(benches: tuple[str, ...], as_json: bool) -> None:
    """List the benches by name; of those that are named, say what is measured and what is not."""
    if benches:
        _tell(benches, as_json=as_json)
        return
    for fields in _every():
        if as_json:
            click.echo(json.dumps({"kind": "bench", **fields}))
            continue
        loaded = fields["mixin"] or "-"
        click.echo(printable(f"{fields['name']:<20} {fields['class'] or '-':<54} {loaded}"))


def _every() -> list[dict[str, Any]]:
    from harness.benches import bench_names, more_benches
    from harness.benches.table import rows
    from harness.loaders.benches import installed_benches

    known = rows()
    names = dict.fromkeys((*bench_names(), *more_benches(), *installed_benches()))
    return [
        {
            "name": name,
            "title": known[name].title if name in known else None,
            "class": known[name].kind if name in known else None,
            "mixin": known[name].mixin if name in known else None,
            "core": name in bench_names(),
        }
        for name in names
    ]


def _tell(names: tuple[str, ...], *, as_json: bool) -> None:
    from harness.benches import get_bench
    from harness.loaders.benches import bench_name
    from harness.measure.bench_summary import summary
    from harness.measure.self_check import known_facts

    for bench in (get_bench(bench_name(name)) for name in names):
        told = list(bench.measures(bench.view.lora_layers)) or list(summary(known_facts(bench), {}))
        if as_json:
            click.echo(json.dumps({"kind": "bench", "name": bench.name, "layers": bench.lora_layers, "told": told}))
            continue
        number = count(len(bench.lora_layers), "layer")
        click.echo(f"{printable(bench.name)}: {number} with a LoRA")
        for line in told:
            click.echo(on_one_line(f"  {line}"))
