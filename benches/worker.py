"""One measurement in a process of its own: `python -m benches.worker '{"engine": …}'`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from .engines import ENGINES, Setting
from .jobs import JOBS

MARK = "FIGURES "


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    job, parameters = order["job"], order["parameters"]
    began = time.perf_counter()
    engine = ENGINES[order["engine"]](Setting(**order["setting"]))
    load_ms = (time.perf_counter() - began) * 1e3
    try:
        own = getattr(engine, job, None)
        figures = own(**parameters) if own else JOBS[job](engine, **parameters)
    finally:
        engine.close()
    print(MARK + json.dumps({**figures, "load_ms": load_ms}), flush=True)


if __name__ == "__main__":
    main()
