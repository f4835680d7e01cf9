from __future__ import annotations

import io
import re

import pytest
from report_samples import HOSTILE, failed, known, matrix_records, passed, run_of, skipped
from rich.console import Console

from harness.errors import UserError
from harness.report.terminal import print_run, print_verdicts


def printed(*verdicts: object, **options: object) -> str:
    file = io.StringIO()
    print_verdicts(verdicts, Console(file=file, width=110, **options))  # type: ignore[arg-type]
    return file.getvalue()


def test_a_failure_is_printed_exactly_as_its_text() -> None:
    assert failed().text() + "\n" in printed(failed())


def test_long_rows_are_not_wrapped() -> None:
    row = ("fix", "x" * 300)
    assert "x" * 300 in printed(failed(rows=(row,)))


def test_the_same_cause_is_printed_once_and_the_others_named() -> None:
    out = printed(*(failed(format=fmt) for fmt in ("peft", "kohya", "diffusers")))
    assert out.count("LH202 alpha ignored") == 1
    assert "also       the same in kohya/qwen-image, diffusers/qwen-image" in out


def test_the_matrix_is_a_sign_per_cell_and_says_what_the_signs_are() -> None:
    out = printed(passed(), failed(), passed("peft", format="kohya", variant="dora"), known("peft", "peft", "flux"))
    assert re.search(r"^peft +✓✓ +≈ *$", out, re.MULTILINE)
    assert re.search(r"^diffsynth-2.0.4 +✕ *$", out, re.MULTILINE)
    assert "✕ wrong, ≈ known, ✓ right; a sign per format and variant" in out


@pytest.mark.parametrize("width", [80, 200])
def test_the_matrix_of_many_loaders_on_many_benches_has_80_columns(width: int) -> None:
    names = [f"{n}:a/very/long/path/to/a/folder/of/loaders/my_loader_{n}.py:load" for n in range(9)]
    places = [f"a-long-bench-name-{n}" for n in range(9)]
    file = io.StringIO()
    verdicts = [passed(name, bench=bench, variant=v) for name in names for bench in places for v in ("lora", "dora")]
    print_run(run_of(*verdicts, failed(names[0], bench=places[0])), Console(file=file, width=width))
    table = [line.rstrip() for line in file.getvalue().splitlines() if "✓✓" in line]
    assert len(table) == 9
    assert max(map(len, table)) <= 80
    assert all(line.startswith(f"{n}:a/very…y_loader_{n}"[:6]) for n, line in enumerate(table))
    assert "…" in table[0].split()[0]
    assert table[0].split()[0].endswith(".py:load")


def test_more_benches_than_fit_are_below_each_other_under_whole_names() -> None:
    places = [f"architecture-{n}" for n in range(40)]
    out = printed(*(passed(bench=bench) for bench in places), passed("one", bench=places[-1]), failed("two", bench="x"))
    assert all(re.search(rf"\b{name}\b", out) for name in places)
    assert out.count("✓") == 41 + 1  # and in the legend
    assert max(len(line.rstrip()) for line in out.splitlines() if "architecture" in line or "✓" in line) <= 80
    assert "; columns:" not in out
    assert len(re.findall(r"^one ", out, re.MULTILINE)) == 1


def test_known_failures_are_a_line_per_finding_with_code_and_number() -> None:
    reason = "raises (docs/findings/lycoris-missing-alpha.md)"
    some = [known("lycoris", "kohya", bench).model_copy(update={"reason": reason}) for bench in ("a", "b")]
    assert "≈ LH202 lycoris: a file without alpha raises a TypeError (2 cells) lycoris-missing-alpha" in printed(*some)


def test_the_verdict_and_the_failures_are_last_and_short() -> None:
    wrong = [failed(f"loader-{n}", code=f"LH{200 + n}") for n in range(60)]
    out = printed(*wrong, *(skipped(f"s-{n}") for n in range(60))).splitlines()
    assert out[-1].startswith("60 of 60 loaders do not reproduce the training. loader-0: ")
    assert out[-1].endswith("; and 56 more loaders.")
    assert len(out[-1]) < 400
    assert out[-2] == "and 35 more causes: --json or the report has them all"
    assert "– and 55 more reasons for what was not measured" in out
    assert sum(line.startswith("  loader ") for line in out) == 5
    assert out.index("– and 55 more reasons for what was not measured") < min(
        i for i, line in enumerate(out) if line.startswith("LH20")
    )


def test_a_failure_names_the_page_of_its_code_where_a_site_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "  page " not in printed(failed())
    monkeypatch.setenv("LORA_HARNESS_SITE", "https://example.org/lora")
    assert "  page       https://example.org/lora/codes/LH202.html\n" in printed(failed())
    monkeypatch.setenv("LORA_HARNESS_SITE", "javascript:alert(1)")
    with pytest.raises(UserError, match="is no address"):
        printed(failed())


def test_the_last_line_is_the_sentence() -> None:
    assert printed(passed()).splitlines()[-1] == "The loader reproduces the training: 1 checks passed."


def test_what_was_skipped_is_said_with_its_reason() -> None:
    assert "– diffusers merge on cuda not measured: no CUDA device" in printed(passed(), skipped("diffusers"))


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in printed(failed(), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in printed(failed(), force_terminal=True)


@pytest.mark.parametrize("text", [*HOSTILE, "[red]markup[/red]", "[link=file:///etc]x[/link]"])
def test_hostile_text_is_printed_as_text(text: str) -> None:
    out = printed(failed(text, title=text, rows=(("worst", text),), format=text))
    assert "\x1b" not in out
    assert "\u202e" not in out
    if text.isprintable():
        assert text in out


def test_a_whole_sample_night_prints(capsys: pytest.CaptureFixture[str]) -> None:
    print_run(run_of(*matrix_records()))  # type: ignore[arg-type]
    assert "3 of 5 loaders do not reproduce the training." in capsys.readouterr().out
