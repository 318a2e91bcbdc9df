"""Steps that need each other's results, run by an engine as soon as they can; knows nothing of what the steps do."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from nfnet_lib.cell import CellFailed, CellStopped
from nfnet_lib.engine import Engine, first_ended


class Work(NamedTuple):
    """A call for an engine."""

    function: Callable
    arguments: tuple
    options: dict[str, Any]


class Done(NamedTuple):
    """What a call would give that was made before."""

    result: Any


class Step(NamedTuple):
    """One node of a study's graph.

    make: called when all of `needs` have ended, well or not: the work that is left, why there can't be any (a failure), or
    None where it needed no engine. told: what to say of the result, after so many seconds, or None if it was there.
    """

    name: str
    needs: tuple[str, ...]
    make: Callable[[], Work | Done | str | None]
    told: Callable[[Any, float | None], str]


def run_graph(
    steps: list[Step], engine: Engine, say: Callable[[str], None], progress: Callable[[], Any]
) -> dict[str, str]:
    """Run every step when those that it needs have ended; {name: error} of those that failed.

    Of several that can run the engine gets those first that stand first in `steps`.
    """
    waiting, ready, running, failures = {step.name: step for step in steps}, {}, {}, {}

    def ended(name: str, text: str) -> None:
        if text:
            say(text)
        progress()

    while waiting or ready or running:
        busy = set(waiting) | set(ready) | {step.name for step, _ in running.values()}
        for step in [step for step in waiting.values() if busy.isdisjoint(step.needs)]:
            del waiting[step.name]
            made = step.make()
            if isinstance(made, Work):
                ready[step.name] = (step, made)
                continue
            if isinstance(made, str):
                failures[step.name] = made
            ended(
                step.name,
                f"{step.name}: {made}" if isinstance(made, str) else step.told(made.result, None) if made else "",
            )
        for name in [step.name for step in steps if step.name in ready]:
            if len(running) >= engine.at_once:
                break
            step, work = ready.pop(name)
            running[engine.submit(work.function, *work.arguments, **work.options)] = (step, time.monotonic())
        for future in first_ended(running) if running else ():
            step, started = running.pop(future)
            try:
                ended(step.name, step.told(future.result(), time.monotonic() - started))
            except CellStopped as error:  # somebody put a STOP file into the study's folder
                raise KeyboardInterrupt from error
            except CellFailed as error:
                failures[step.name] = str(error)
                ended(step.name, f"{step.name}: FAILED: {error}")
    return failures
