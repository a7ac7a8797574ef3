"""One timing process: ``python -m loracc.timing.worker JOB.json ANSWER``; see :mod:`loracc.timing.job`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loracc.errors import LoraccError
from loracc.runners.runner import Runner, open_runner
from loracc.timing.job import TimedModel, read_feeds
from loracc.timing.paired import measure

__all__ = ["main", "work"]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load the models, in the order of this process, and measure."""
    models = [TimedModel(**model) for model in job["models"]]
    order = list(range(len(models)))
    if job["swapped"]:
        order.reverse()
    runners: dict[int, Runner] = {}
    for index in order:
        model = models[index]
        adapter = Path(model.adapter) if model.adapter else None
        runners[index] = open_runner(Path(model.path), model.provider, threads=job["threads"], adapter=adapter)
    calls = [runners[index].timed(read_feeds(job["feeds"][index])) for index in range(len(models))]
    blocks = measure(calls, job["seconds"], reverse=job["swapped"])
    return {
        "blocks": [block.tolist() for block in blocks],
        "runners": [runners[index].name for index in range(len(models))],
    }


def main(job: str, answer: str) -> None:
    """Read the job, do it, write the answer; what the user can mend is an answer too."""
    try:
        body = work(json.loads(Path(job).read_text(encoding="utf-8")))
    except LoraccError as error:
        body = {"error": {"kind": type(error).__name__, "message": error.message, "hint": error.hint}}
    Path(answer).write_text(json.dumps(body), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
