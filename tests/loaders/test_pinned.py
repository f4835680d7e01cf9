"""Strings with a release, a checkout or a Python in them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from harness.errors import LoaderSpecError
from harness.loaders.live import live_loaders
from harness.loaders.pinned import is_pinned, pinned_here
from harness.loaders.registry import releases_here, resolve


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path / "releases"))
    return tmp_path / "releases"


def unpack(root: Path, name: str, version: str, package: str | None = None) -> Path:
    folder = root / f"{name}-{version}"
    (folder / (package or name)).mkdir(parents=True)
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("spec", "pinned"),
    [
        ("peft==0.12.0", True),
        ("lycoris-lora==3.1.0", True),
        ("diffusers==0.33.1,peft==0.17.1", True),
        ("peft@some/folder", True),
        ("peft", False),
        ("my.module:load", False),
        ("folder/loader.py:load", False),
        ("me@home.py:load", False),
        ("cmd:merge --x a==b", False),
    ],
)
def test_which_strings_name_a_release(spec, pinned):
    assert is_pinned(spec) == pinned


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])  # an older pip makes eggs
def test_a_release_is_found_by_the_name_of_the_loader_or_of_its_package(root, kind):
    folder = unpack(root, "lycoris-lora", "3.1.0", "lycoris")
    (folder / "lycoris-lora-3.1.0.dist-info").rename(folder / f"lycoris-lora-3.1.0.{kind}")
    for spec in ("lycoris==3.1.0", "lycoris-lora==3.1.0", "lycoris-runtime==3.1.0"):
        subject = resolve(spec)
        assert subject.spec == spec
        assert subject.version == "3.1.0"
        assert subject.elsewhere is not None
        assert subject.elsewhere.folders == (str(folder),)
    own, pinned = resolve("lycoris-runtime").declaration, resolve("lycoris-runtime==3.1.0").declaration
    assert replace(pinned, unload=own.unload, set_strength=own.set_strength) == own
    assert pinned.unload is not None
    assert resolve("lycoris==3.1.0").declaration.unload is None
    assert [each.name for each in releases_here()] == ["lycoris==3.1.0", "lycoris-runtime==3.1.0"]


def test_companions_come_after_the_release_and_win_over_what_is_installed(root):
    first, second = unpack(root, "diffusers", "0.33.1"), unpack(root, "peft", "0.17.1")
    beside = [unpack(root, *pin.split("==")) for pin in ("transformers==4.57.6", "tokenizers==0.22.2")]
    beside.append(unpack(root, "huggingface-hub", "0.36.0", "huggingface_hub"))
    subject = resolve("diffusers==0.33.1,peft==0.17.1")
    assert subject.version == "0.33.1"
    assert subject.elsewhere.folders == tuple(map(str, (first, second, *beside)))


def test_the_installed_release_needs_no_folder():
    version = metadata.version("peft")
    subject = resolve(f"peft=={version}")
    assert (subject.version, subject.elsewhere.folders) == (version, ())
    assert subject.known_as == "peft"


def test_a_release_that_is_not_here_names_the_command_that_gets_it():
    with pytest.raises(LoaderSpecError, match=r"run `lora-harness install peft==0\.3\.0`, or give --install"):
        resolve("peft==0.3.0")
    with pytest.raises(LoaderSpecError, match=r"install diffusers==0\.2\.0 peft==0\.3\.0`"):
        resolve("diffusers==0.2.0,peft==0.3.0")


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("peft==", "no loader is called"),
        ("peft==new", "'new' is no exact version"),
        ("peft==0.12.0,", "no exact release"),
        ("nosuch==1.0", "no loader whose releases are known"),
        ("comfyui==1.0", "comfyui has no releases; write comfyui@COMMIT"),
        ("peft@nowhere", "there is no folder nowhere"),
        ("peft==../../x", "no exact version"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(spec, what):
    with pytest.raises(LoaderSpecError, match=what):
        resolve(spec)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, list[str]]:
    """A checkout of a package `peft` with two commits, and the ids of these."""
    folder = tmp_path / "checkout"
    (folder / "src" / "peft").mkdir(parents=True)
    git(folder, "init", "-q")
    commits = []
    for version in ("7.0", "7.1"):
        (folder / "src" / "peft" / "__init__.py").write_text(f'__version__ = "{version}"\n')
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", version)
        commits.append(git(folder, "rev-parse", "HEAD"))
    return folder, commits


def with_file(folder: Path, name: str, text: str) -> str:
    """Commit a file and return the id of the commit."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", name)
    return git(folder, "rev-parse", "HEAD")


def test_a_checkout_is_taken_at_a_commit_and_left_as_it_is(checkout):
    folder, (first, second) = checkout
    (folder / "src" / "peft" / "__init__.py").write_text("not committed")
    old, new = resolve(f"peft@{folder}@{first[:8]}"), resolve(f"peft@{folder}")
    assert (old.version, new.version) == (f"7.0+{first[:12]}", f"7.1+{second[:12]}")
    (source,) = old.elsewhere.folders
    assert (Path(source) / "peft" / "__init__.py").read_text() == '__version__ = "7.0"\n'
    told = metadata.Distribution.discover(name="peft", path=[source])
    assert next(iter(told)).version == "7.0"
    assert git(folder, "status", "--porcelain") == "M src/peft/__init__.py"
    assert resolve(f"peft@{folder}@{first}").elsewhere == old.elsewhere  # exported once


def test_a_commit_that_is_not_there_says_so(checkout):
    folder, _ = checkout
    with pytest.raises(LoaderSpecError, match="no checkout that has the commit 'deadbeef'"):
        resolve(f"peft@{folder}@deadbeef")
    with pytest.raises(LoaderSpecError, match="no checkout that has the commit"):
        resolve(f"peft@{folder}@--output=x")
    with pytest.raises(LoaderSpecError, match="is no checkout of diffusers"):
        resolve(f"diffusers@{folder}")


def test_an_application_is_taken_at_a_commit_of_the_checkout_that_its_variable_names(tmp_path, monkeypatch, checkout):
    folder, _ = checkout
    monkeypatch.setenv("LORA_HARNESS_COMFYUI", str(folder))
    third = with_file(folder, live_loaders()["comfyui"].checkout.marker, "")
    with_file(folder, "src/peft/__init__.py", "later")
    subject = resolve(f"comfyui@{third[:10]}")
    assert (subject.version, subject.known_as) == (third[:12], "comfyui")
    exported = Path(subject.elsewhere.variables["LORA_HARNESS_COMFYUI"])
    assert (exported / "src" / "peft" / "__init__.py").read_text() == '__version__ = "7.1"\n'


def test_a_commit_of_an_application_has_the_version_that_it_states(tmp_path, monkeypatch, checkout):
    folder, _ = checkout
    monkeypatch.setenv("LORA_HARNESS_COMFYUI", str(folder))
    with_file(folder, live_loaders()["comfyui"].checkout.marker, "")
    commit = with_file(folder, "pyproject.toml", '[project]\nversion = "0.9.2"\n')
    assert resolve("comfyui@HEAD").version == f"0.9.2+{commit[:12]}"


def test_a_commit_of_another_application_is_named(monkeypatch, checkout):
    folder, (first, _) = checkout
    with pytest.raises(LoaderSpecError, match=rf"has no comfy/lora\.py at {first[:12]}: it is no comfyui"):
        resolve(f"comfyui@{folder}@{first}")
    monkeypatch.setenv("LORA_HARNESS_COMFYUI", str(folder))
    for place in ("/nowhere", "/nowhere@HEAD", "./nowhere@HEAD"):
        with pytest.raises(LoaderSpecError, match=r"there is no folder .*nowhere; write comfyui@FOLDER@COMMIT"):
            resolve(f"comfyui@{place}")


def test_a_commit_says_which_package_it_lacks_here(monkeypatch, checkout):
    folder, _ = checkout
    live = live_loaders()["lightx2v"]
    with_file(folder, live.checkout.marker, "")
    monkeypatch.setitem(live_loaders("lightx2v"), "lightx2v", replace(live, needs=("not-installed-here",)))
    with pytest.raises(LoaderSpecError, match=r"lightx2v@.*: not-installed-here is not installed; run `pip install"):
        resolve(f"lightx2v@{folder}")


def test_a_python_without_the_loader_is_refused_before_anything_is_judged(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    with pytest.raises(LoaderSpecError, match=r"empty' has no torch; there must be torch, safetensors, diffusers"):
        resolve(f"diffusers@{tmp_path / 'empty'}")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(LoaderSpecError, match=r"broken does not run: no such library"):
        resolve(f"peft@{broken}")


def test_another_python_runs_what_it_has(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link alone would have no packages
    python.chmod(0o755)
    for place in (tmp_path / "venv", python):
        subject = resolve(f"peft@{place}")
        assert subject.elsewhere.python == str(python)
        assert subject.elsewhere.folders == ()
    assert pinned_here(live_loaders()["peft"]) == []
