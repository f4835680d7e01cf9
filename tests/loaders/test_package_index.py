"""What a package index says of one package, and what is said when it does not answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from harness.errors import UserError
from harness.loaders import package_index
from harness.loaders.between import releases_between
from harness.loaders.live import live_loaders
from harness.loaders.pinned import pins_of

PAGES: dict[str, tuple[str, bytes]] = {}


class _Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # http.server's own name
        kind, body = PAGES.get(self.path, ("", b""))
        self.send_response(200 if kind else 404)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def index(monkeypatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    package_index.every_published.cache_clear()
    PAGES.clear()
    yield address
    server.shutdown()
    server.server_close()
    package_index.every_published.cache_clear()


def a_file(name: str, day: str = "2024-05-06", size: int = 1000, **more: object) -> dict[str, object]:
    return {"filename": name, "upload-time": f"{day}T01:02:03Z", "size": size, "yanked": False, **more}


def tell(package: str, *files: dict[str, object]) -> None:
    body = json.dumps({"files": files}).encode()
    PAGES[f"/simple/{package}/"] = ("application/vnd.pypi.simple.v1+json", body)


def test_releases_come_oldest_first_with_day_and_size():
    tell(
        "peft",
        a_file("peft-0.10.0.tar.gz", "2024-03-21", 9),
        a_file("peft-0.10.0-py3-none-any.whl", "2024-03-20", 7),
        a_file("peft-0.9.0-py3-none-any.whl", "2024-02-01", 5),
        a_file("peft-0.11.0rc1-py3-none-any.whl"),
        a_file("nonsense"),
    )
    assert package_index.published_release("peft", "0.11.0rc1") is not None  # one that is named need not be final
    assert package_index.published_release("peft", "0.11.0") is None
    ends = {"low": "0.10.0", "high": "0.11.0rc1"}
    assert releases_between(live_loaders()["peft"], **ends, every=True, ask_index=True) == [
        ("0.10.0", "2024-03-20"),
        ("0.11.0rc1", "2024-05-06"),
    ]
    found = package_index.published("peft")
    assert [(each.version, each.day, each.size) for each in found] == [
        ("0.9.0", "2024-02-01", 5),
        ("0.10.0", "2024-03-20", 7),
    ]


def test_a_wheel_of_another_machine_is_not_the_one_that_is_fetched():
    tell(
        "peft",
        a_file("peft-1.0-cp27-cp27m-win32.whl", size=3),
        a_file("peft-1.0-py3-none-any.whl", size=4),
    )
    assert package_index.published("peft")[0].size == 4


def test_a_range_takes_the_last_of_each_minor_series_and_its_ends():
    tell("peft", *(a_file(f"peft-{v}-py3-none-any.whl") for v in ("0.9.0", "0.9.1", "0.10.0", "0.10.1", "0.11.0")))
    live = live_loaders()["peft"]
    chosen = releases_between(live, "0.9.0", None, every=False, ask_index=True)
    assert [version for version, _ in chosen] == ["0.9.0", "0.9.1", "0.10.1", "0.11.0"]
    every = releases_between(live, "0.9.1", "0.10.1", every=True, ask_index=True)
    assert [version for version, _ in every] == ["0.9.1", "0.10.0", "0.10.1"]


def test_what_was_taken_back_is_only_taken_by_its_name():
    tell("peft", a_file("peft-1.0-py3-none-any.whl", yanked="broken"), a_file("peft-1.1-py3-none-any.whl"))
    live = live_loaders()["peft"]
    assert [v for v, _ in releases_between(live, None, None, every=True, ask_index=True)] == ["1.1"]
    assert [v for v, _ in releases_between(live, "1.0", None, every=True, ask_index=True)] == ["1.0", "1.1"]
    assert pins_of("peft>=0") == ["peft==1.1"]


def test_names_and_ranges_become_pins():
    tell("lycoris-lora", *(a_file(f"lycoris_lora-{v}-py3-none-any.whl") for v in ("3.0.0", "3.1.0", "4.0.0")))
    assert pins_of("lycoris") == ["lycoris-lora==4.0.0"]
    assert pins_of("lycoris-lora>=3,<4") == ["lycoris-lora==3.0.0", "lycoris-lora==3.1.0"]
    assert pins_of("diffusers==0.33.1,peft==0.17.1") == ["diffusers==0.33.1", "peft==0.17.1"]


def test_an_index_without_such_a_package_says_so():
    with pytest.raises(UserError, match="has no package peft"):
        package_index.published("peft")


def test_an_index_that_does_not_answer_is_one_sentence_without_its_password(monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:secret@127.0.0.1:9/simple")
    with pytest.raises(UserError, match="does not answer") as told:
        package_index.published("peft")
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_an_index_that_speaks_html_is_asked_through_pip(monkeypatch):
    PAGES["/simple/peft/"] = ("text/html", b"<a href='peft-1.0.tar.gz'>peft-1.0.tar.gz</a>")
    monkeypatch.setattr(package_index, "_listed_by_pip", lambda name: ["1.0", "0.9"])
    assert [(each.version, each.day) for each in package_index.published("peft")] == [("0.9", None), ("1.0", None)]


@pytest.mark.parametrize("body", [b"[]", b'{"files": 3}', b'{"files": [3, {"filename": null}]}', b"\xff", b"{"])
def test_an_index_that_answers_nonsense_has_no_release(body, monkeypatch):
    PAGES["/simple/peft/"] = ("application/vnd.pypi.simple.v1+json", body)
    monkeypatch.setattr(package_index, "_listed_by_pip", lambda name: ())
    with pytest.raises(UserError, match="has no release of peft"):
        package_index.published("peft")


def test_a_version_that_is_none_is_bad_usage():
    with pytest.raises(UserError, match="'x' is no version"):
        releases_between(live_loaders()["peft"], "x", None, every=False, ask_index=False)
