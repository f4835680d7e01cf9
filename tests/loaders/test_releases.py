"""Releases in folders of their own: found, fetched when asked, and never half."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.loaders import installing, releases


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path / "releases"))
    return tmp_path / "releases"


def fake_installers(monkeypatch, *, uv=True, failing=(), message=""):
    """Let `uv` (if it is there) and pip unpack a package `acme`, or fail with a message."""
    calls = []

    def run(command, **_):
        name = "uv" if command[1] == "pip" else "pip"
        calls.append(command)
        if name in failing:
            return subprocess.CompletedProcess(command, 1, "", message)
        (Path(command[command.index("--target") + 1]) / "acme").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(installing.subprocess, "run", run)
    monkeypatch.setattr(installing.shutil, "which", lambda name: "/usr/bin/uv" if uv else None)
    monkeypatch.setattr(installing.sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(installing, "installed_version", lambda name: "24.0" if name == "pip" else None)
    return calls


def test_a_release_is_unpacked_without_its_dependencies_and_found_afterwards(root, monkeypatch):
    calls = fake_installers(monkeypatch)
    for version in ("1.2.0", "1.10.0"):
        assert installing.install("acme", version).folder == root / f"acme-{version}"
    assert [release.version for release in releases.find_releases("acme")] == ["1.2.0", "1.10.0"]
    assert all(call[0] == "/usr/bin/uv" and "--no-deps" in call for call in calls)
    assert sorted(path.name for path in root.iterdir()) == ["acme-1.10.0", "acme-1.2.0"]


def test_a_release_that_is_there_is_not_fetched_again(monkeypatch):
    calls = fake_installers(monkeypatch)
    installing.install("acme", "1.2.0")
    installing.install("acme", "1.2.0")
    assert len(calls) == 1
    assert installing.missing(["acme==1.2", "acme==1.3"]) == [("acme", "1.3")]


def test_pip_does_it_where_uv_is_not(monkeypatch):
    calls = fake_installers(monkeypatch, uv=False)
    installing.install("acme", "1.0")
    assert [call[:4] for call in calls] == [["/usr/bin/python3", "-m", "pip", "install"]]


def test_pip_does_it_where_uv_cannot(monkeypatch):
    calls = fake_installers(monkeypatch, failing=("uv",), message="error: no such index")
    installing.install("acme", "1.0")
    assert [call[1] for call in calls] == ["pip", "-m"]


def test_without_a_network_the_error_is_what_the_installer_says_last_and_nothing_is_left(root, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution found for acme==1.2.0\n\n[notice] A new release of pip\n"
    fake_installers(monkeypatch, failing=("uv", "pip"), message=said)
    with pytest.raises(UserError, match=r"pip says: ERROR: No matching distribution found for acme==1\.2\.0$"):
        installing.install("acme", "1.2.0")
    assert list(root.iterdir()) == []


def test_what_uv_says_in_several_lines_is_one_sentence(monkeypatch):
    said = (
        "error: Failed to fetch: `https://x/`\n  Caused by: request failed\n  Caused by: dns error\n hint: be online\n"
    )
    fake_installers(monkeypatch, failing=("uv",), message=said)
    monkeypatch.setattr(installing, "installed_version", lambda name: None)
    with pytest.raises(UserError, match=r"uv says: error: Failed to fetch: `https://x/`; Caused by: dns error$"):
        installing.install("acme", "1.0")


@pytest.mark.parametrize("pin", ["acme", "acme>=1", "../evil==1", "acme==../1", "--index-url==1", "acme==1\n"])
def test_only_exact_pins_are_taken(pin):
    with pytest.raises(UserError, match="no exact release"):
        installing.parse_pin(pin)


def test_a_folder_without_the_package_in_it_is_no_release(root):
    (root / "acme-1.0").mkdir(parents=True)
    (root / "acme-tools-1.0" / "acme").mkdir(parents=True)
    assert releases.find_releases("acme") == []


def test_an_installed_package_counts_as_a_release():
    assert [release.name for release in releases.find_releases("safetensors")] == ["safetensors"]


def test_a_root_that_cannot_be_written_is_one_sentence(root, monkeypatch):
    root.write_text("a file where the folder should be")
    fake_installers(monkeypatch)
    with pytest.raises(UserError, match="LORA_HARNESS_RELEASES chooses another place"):
        installing.install("acme", "1.0")


def test_releases_go_to_the_users_cache_and_are_still_found_where_they_were(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_HARNESS_RELEASES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(releases.sys, "prefix", str(tmp_path / "venv"))
    assert releases.releases_root().is_relative_to(tmp_path / "cache" / "lora-harness" / "releases")
    (tmp_path / "venv" / "share" / "lora-harness" / "releases" / "acme-1.0" / "acme").mkdir(parents=True)
    (releases.releases_root() / "acme-1.1" / "acme").mkdir(parents=True)
    assert [release.version for release in releases.unpacked("acme")] == ["1.0", "1.1"]


def test_a_release_gets_what_it_needs_beside_it():
    assert "transformers==4.57.6" in releases.beside("peft", "0.17.1")
    assert releases.beside("peft", "0.18.0") == ()
    assert ("transformers", "4.57.6") in installing.missing(["peft==0.16.0"])
