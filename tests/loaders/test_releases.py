from __future__ import annotations

import subprocess

import pytest

from harness.errors import UserError
from harness.loaders import releases


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path / "releases"))
    return tmp_path / "releases"


def fake_pip(monkeypatch, status=0, message=""):
    calls = []

    def run(command, **_):
        calls.append(command)
        if status == 0:
            target = releases.Path(command[command.index("--target") + 1])
            (target / "acme").mkdir(parents=True)
        return subprocess.CompletedProcess(command, status, "", message)

    monkeypatch.setattr(releases.subprocess, "run", run)
    return calls


def test_a_release_is_unpacked_without_its_dependencies_and_found_afterwards(root, monkeypatch, capsys):
    calls = fake_pip(monkeypatch)
    assert releases.main(["acme==1.2.0", "acme==1.10.0"]) == 0
    assert [release.version for release in releases.find_releases("acme")] == ["1.2.0", "1.10.0"]
    assert all("--no-deps" in call for call in calls)
    assert "acme 1.2.0: unpacked to" in capsys.readouterr().out
    assert sorted(path.name for path in root.iterdir()) == ["acme-1.10.0", "acme-1.2.0"]


def test_a_release_that_is_there_is_not_fetched_again(monkeypatch, capsys):
    calls = fake_pip(monkeypatch)
    releases.main(["acme==1.2.0"])
    assert releases.main(["acme==1.2.0"]) == 0
    assert len(calls) == 1
    assert "already in" in capsys.readouterr().out


def test_without_a_network_the_error_is_pips_last_line_and_nothing_is_left(root, monkeypatch, capsys):
    fake_pip(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found for acme==1.2.0\n")
    assert releases.main(["acme==1.2.0"]) == 2
    assert "pip says: ERROR: No matching distribution found" in capsys.readouterr().err
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("pin", ["acme", "acme>=1", "../evil==1", "acme==../1", "--index-url==1"])
def test_only_exact_pins_are_taken(pin):
    with pytest.raises(UserError, match="no exact release"):
        releases.install(pin)


def test_a_folder_without_the_package_in_it_is_no_release(root):
    (root / "acme-1.0").mkdir(parents=True)
    (root / "acme-tools-1.0" / "acme").mkdir(parents=True)
    assert releases.find_releases("acme") == []


def test_an_installed_package_counts_as_a_release():
    assert [release.name for release in releases.find_releases("safetensors")] == ["safetensors"]


def test_a_root_that_cannot_be_written_is_one_sentence(root, monkeypatch, capsys):
    root.write_text("a file where the folder should be")
    fake_pip(monkeypatch)
    assert releases.main(["acme==1.0"]) == 2
    assert "LORA_HARNESS_RELEASES chooses another place" in capsys.readouterr().err
