"""Facts that only the code of others can tell, gathered in a child and handed back as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.isolation.jobs import Channel, run_jobs
from harness.isolation.subject import START_SECONDS, Part, SubjectLostError, subject_process


def facts_apart(
    gather: Callable[[], dict[str, Any]],
    name: str,
    doing: str,
    did: str,
    *,
    memory_limit: int | None = None,
    seconds: float = START_SECONDS,
) -> dict[str, Any]:
    """Return what `gather` returns in a child, or {"error": a sentence} that begins with `name` where it does not.

    `doing` and `did` say what it does there: "importing", "imported".
    """
    found: list[Any] = []

    def job(channel: Channel) -> None:
        def answer(order: str, on_part: Part) -> dict[str, Any]:
            return gather()

        with subject_process(answer, apart=channel.apart, memory_limit=memory_limit) as asked:
            try:
                channel.send(asked.ask(name, seconds))
            except SubjectLostError as lost:
                late = f"{doing} it takes longer than {seconds:g} s"
                what = late if lost.status == "timeout" else f"{doing} it ended its process: {lost.what}"
                channel.send({"error": f"{name}: {what}"})

    (end,) = run_jobs([job], budget=START_SECONDS + seconds, on_event=lambda index, event: found.append(event))
    facts = found[0] if found else {"error": f"{name}: {end.what}"}
    if not isinstance(facts, dict) or not isinstance(facts.get("error", ""), str):
        return {"error": f"{name}: the process that {did} it gave no answer that makes sense"}
    return facts
