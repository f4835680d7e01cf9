"""What a run must say about itself to be repeated: versions, machine, device, commit, seed and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from harness.isolation.device import cuda_devices
from harness.report.models import Header

PACKAGES = ("lora-harness", "torch", "safetensors", "peft", "diffusers", "transformers", "diffsynth", "hypothesis")


def new_header(
    command: str | Sequence[str] | None = None,
    *,
    seed: int | None = None,
    profile: str = "dev",
    planned: Iterable[str] = (),
) -> Header:
    """Build the header of a run that starts now; `command` defaults to the process's own command line."""
    now = datetime.now(timezone.utc)
    return Header(
        run_id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        created=now.isoformat(timespec="microseconds"),  # runs of one second stay in order
        command=_command_line(command),
        seed=seed,
        profile=profile,
        machine=os.environ.get("LORA_HARNESS_MACHINE") or platform.node(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        device=_device(),
        commit=_commit(),
        versions=installed_versions(),
        planned=tuple(planned),
    )


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of the installed packages, without importing them."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _command_line(command: str | Sequence[str] | None) -> str:
    if isinstance(command, str):
        return command
    return shlex.join(command if command is not None else ["lora-harness", *sys.argv[1:]])


def _device() -> str:
    devices = cuda_devices() if "torch" in sys.modules else ()
    return f"cuda ({devices[0]})" if devices else "cpu"


def _commit() -> str | None:
    if commit := os.environ.get("GITHUB_SHA"):
        return commit[:12]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
