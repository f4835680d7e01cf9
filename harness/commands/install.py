"""`lora-harness install`: fetch releases, each to a folder of its own, to be checked beside the installed ones."""

from __future__ import annotations

import time

import click


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness install peft==0.12.0 diffusers==0.33.1\n"
    "  lora-harness install 'diffusers>=0.31,<0.35'\n"
    "  lora-harness install lycoris --dry-run"
)
@click.argument("releases", nargs=-1, required=True, metavar="RELEASE...")
@click.option("--dry-run", is_flag=True, help="Only say what would be fetched, and how large it is.")
def command(releases: tuple[str, ...], dry_run: bool) -> None:
    """Fetch each RELEASE, `name==1.2.3` or a range such as `name>=1.2,<2`, with uv or pip; a name alone is the newest.

    It is unpacked without its dependencies, in the user's cache or LORA_HARNESS_RELEASES, and installs nothing into
    this environment. `lora-harness check name==1.2.3` then runs it.
    """
    from harness.loaders.installing import here, install, missing, parse_pin, said_size, sized
    from harness.loaders.pinned import pins_of

    pins = [pin for text in releases for pin in pins_of(text)]
    absent = missing(pins)
    for name, version in dict.fromkeys(map(parse_pin, pins)):
        if (name, version) not in absent and (there := here(name, version)):
            click.echo(f"{name} {version}: already in {there.folder}")
    if absent:
        click.echo(said_size(sized(absent)))
    for name, version in absent if not dry_run else ():
        began = time.monotonic()
        release = install(name, version)
        click.echo(f"{name} {version}: unpacked to {release.folder} in {time.monotonic() - began:.1f} s")
