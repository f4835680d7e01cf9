from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness.errors import LoaderSpecError
from harness.loaders import registry
from harness.loaders.declaration import loader
from harness.loaders.protocol import Subject
from harness.loaders.registry import installed, resolve

PLAIN = "def load(model, lora, *, strength=1.0): return (model, lora, strength)\n"


def plain(model, lora, *, strength=1.0):
    return strength


def spec_of(tmp_path: Path, text: str, name: str = "load") -> str:
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path / 'mine.py'}:{name}"


def test_a_function_is_a_subject_of_its_own_name():
    subject = resolve(plain)
    assert (subject.spec, subject.load) == (f"{__name__}:plain", plain)


def test_a_registered_name_has_the_version_of_its_distribution():
    assert resolve("peft").version == metadata.version("peft")
    assert resolve("diffusers-fused").version == metadata.version("diffusers")


def test_a_module_spec_has_the_version_of_the_distribution_that_owns_it():
    with pytest.raises(LoaderSpecError, match="write load"):
        resolve("pytest:skip")
    assert registry._version_of("pytest.anything") == metadata.version("pytest")
    assert registry._version_of("os") is None


def test_a_file_spec_calls_the_function_in_the_file(tmp_path):
    subject = resolve(spec_of(tmp_path, PLAIN))
    assert subject.load("model", "lora", strength=0.5) == ("model", "lora", 0.5)
    assert subject.version is None


def test_a_file_may_import_its_neighbours_at_the_top_and_inside_the_function(tmp_path):
    (tmp_path / "neighbour_a.py").write_text("FACTOR = 2\n")
    (tmp_path / "neighbour_b.py").write_text("FACTOR = 5\n")
    text = (
        "import neighbour_a\n"
        "def load(model, lora, *, strength=1.0):\n"
        "    import neighbour_b\n"
        "    return strength * neighbour_a.FACTOR * neighbour_b.FACTOR\n"
    )
    path = list(sys.path)
    assert resolve(spec_of(tmp_path, text)).load(None, None, strength=3.0) == 30.0
    assert sys.path == path


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"def load(model, lora, *, strength=1.0): return {value}\n")
    first, second = (resolve(f"{tmp_path / folder}/same.py:load") for folder in "ab")
    assert (first.load(None, None), second.load(None, None)) == (1, 2)


def test_a_package_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "acme_loaders").mkdir()
    (tmp_path / "acme_loaders" / "lora.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert resolve("acme_loaders.lora:load").load(1, 2, strength=3) == (1, 2, 3)


def test_a_declaration_travels_with_the_function(tmp_path):
    text = "from harness.loaders.declaration import loader\n@loader(formats={'kohya'}, benches={'flux'})\n" + PLAIN
    subject = resolve(spec_of(tmp_path, text))
    assert (subject.formats, subject.benches) == (("kohya",), ("flux",))
    assert resolve(plain).cells == tuple(
        (form, bench)
        for form in ("peft", "kohya", "diffusers", "diffsynth")
        for bench in ("qwen-image", "qwen-image-fused")
    )


def test_a_cell_taken_out_by_a_declaration_has_its_reason():
    @loader(formats={"peft", "kohya"}, unsupported={("kohya", "qwen-image"): "names are cut"})
    def load(model, lora, *, strength=1.0): ...

    subject = resolve(load)
    assert subject.unsupported("kohya", "qwen-image") == "names are cut"
    assert subject.unsupported("kohya", "qwen-image-fused") is None
    assert "does not declare the format diffusers" in str(subject.unsupported("diffusers", "qwen-image"))
    assert ("kohya", "qwen-image") not in subject.cells


def test_a_declared_strength_argument_is_the_keyword_used():
    @loader(strength_argument="alpha")
    def load(model, lora, alpha=1.0):
        return alpha

    assert resolve(load).load(None, None, strength=0.25) == 0.25


def test_a_strength_keyword_wins_over_the_declared_name():
    @loader(strength_argument="alpha")
    def load(model, lora, *, strength=1.0, alpha=7.0):
        return strength, alpha

    assert resolve(load).load(None, None, strength=0.25) == (0.25, 7.0)


def test_a_function_that_takes_any_keyword_gets_the_declared_one():
    @loader(strength_argument="scale")
    def load(model, lora, **options):
        return options

    assert resolve(load).load(None, None, strength=0.25) == {"scale": 0.25}


def test_a_callable_object_is_a_loader():
    class Loader:
        def __call__(self, model, lora, *, strength=1.0):
            return strength

    assert resolve(Loader()).load(None, None, strength=2.0) == 2.0


BAD = {
    "pfet": r"no loader is called 'pfet'; did you mean peft\?.*known: .*diffusers, .*peft",
    "nowhere/loader.py:load": r"there is no file .*nowhere/loader\.py",
    "nowhere/loader.py": r"names a file but no function; write nowhere/loader\.py:load",
    "no_such_package.lora:load": r"cannot import no_such_package\.lora: No module named 'no_such_package'",
    "json:no_such": r"json has no 'no_such'; it defines",
    "json:decoder": r"is module, not a function load\(model, lora, \*, strength=1\.0\)",
    "json:JSONDecoder": r"is a class; a loader is a function",
    "json:": r"names no function; write json:load",
    ":load": r"names no function",
    "cmd:tool": r"lacks \{base\}, \{lora\}, \{strength\}, \{out\}",
}


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_spec_is_one_sentence_that_says_what_is_wrong(spec):
    with pytest.raises(LoaderSpecError, match=BAD[spec]) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "raise ValueError('no\\nCUDA')": r"importing .*mine\.py raises ValueError: no CUDA$",
    "import no_such_thing": r"cannot import .*mine\.py: No module named 'no_such_thing'",
    "def load(:": r"mine\.py is not valid Python: .*line 1",
    "import sys; sys.exit(3)": r"importing .*mine\.py raises SystemExit: 3",
    "def other(): pass": r"mine\.py has no 'load'; it defines other",
    "load = 3": r"is int, not a function",
    "def load(model): pass": r"takes no keyword 'strength'; write load\(model, lora, \*, strength=1\.0\)",
    "def load(model, lora, scale=1.0): pass": r"or declare @loader\(strength_argument='scale'\)",
    "def load(model, *, strength=1.0): pass": r"must take a model and a path",
    "def load(model, lora, config, *, strength=1.0): pass": r"give config a default",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_sentence_that_says_what_is_wrong(text, tmp_path):
    with pytest.raises(LoaderSpecError, match=BAD_FILES[text]) as caught:
        resolve(spec_of(tmp_path, text))
    assert "\n" not in str(caught.value)


class _Point:
    name, value, dist = "acme", "acme.lora:load", None

    def load(self):
        return plain


def test_another_package_can_register_a_name(monkeypatch):
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [_Point()])
    assert resolve("acme").load("model", "lora", strength=0.5) == plain("model", "lora", strength=0.5)
    assert [entry.name for entry in installed()][-1] == "acme"


def test_an_entry_point_that_fails_is_one_sentence(monkeypatch):
    broken = type("Broken", (_Point,), {"load": lambda self: 1 / 0})
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [broken()])
    with pytest.raises(LoaderSpecError, match=r"acme: importing acme\.lora:load raises ZeroDivisionError"):
        resolve("acme")


def test_an_entry_point_cannot_take_over_a_builtin_name(monkeypatch):
    taken = type("Taken", (_Point,), {"name": "peft"})
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [taken()])
    assert resolve("peft").load is not plain
    assert [entry.name for entry in installed()].count("peft") == 1


def test_what_is_missing_is_listed_with_the_reason_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: metadata.distribution(f"{name}-is-not-here").version)
    listed = {entry.name: entry for entry in installed()}
    assert not listed["peft"].available
    assert "pip install peft" in str(listed["peft"].reason)
    assert "lora-harness install diffsynth" in str(listed["diffsynth"].reason)
    with pytest.raises(LoaderSpecError, match="peft: peft is not installed"):
        resolve("peft")


def test_listing_the_loaders_imports_no_torch():
    code = "import sys; from harness.loaders.registry import installed; installed(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_subject_lists_the_core_formats_first():
    subject = Subject("x", plain, None, loader(formats={"xlabs", "diffsynth", "peft"})(plain).__lora_harness__)
    assert subject.formats == ("peft", "diffsynth", "xlabs")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"formats": {"pefft"}}, "no format is called 'pefft'; known are peft, "),
        ({"formats": "peft"}, r"formats='peft': give a set of names, \{'peft'\}"),
        ({"formats": set()}, "formats is empty"),
        ({"uniform": "rank"}, "uniform='rank': give a set of names"),
        ({"dtypes": {"int8"}}, "dtypes='int8': models and files are of float32"),
        ({"dtypes": 4}, "dtypes=4 is no set of names"),
        ({"unload": "unload"}, "unload='unload' is no function"),
        ({"strength_argument": ""}, "strength_argument='' is no text"),
        ({"modules": ["to_q"]}, r"modules=\['to_q'\] is no text"),
        ({"quantises": "no"}, "quantises='no' is neither True nor False"),
        ({"unsupported": {"peft": "no"}}, "unsupported: 'peft' is no tuple of names"),
    ],
)
def test_what_cannot_be_declared_is_said_in_a_sentence(said, why):
    with pytest.raises(LoaderSpecError, match=why):
        loader(**said)
