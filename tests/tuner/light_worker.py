"""Stands for `portattn.tuner.worker`: the same frames, no device and nothing to import.

``python light_worker.py ROLE``; times are those of `time_ns`, every config is right.
"""

import contextlib
import json
import os
import sys
import time
import zlib

COMPILE_SECONDS, ATTEMPT_SECONDS = 0.002, 0.004


def time_ns(config: dict) -> int:
    """What a config takes: a smooth surface with a little of its own for each config."""
    base = 20_000 + 900 * abs(config["block"] - 4) + 700 * abs(config["depth"] - 2)
    return base + zlib.crc32(json.dumps(config, sort_keys=True).encode()) % 50


def answer(frame: dict) -> dict:
    """One answer, after a while."""
    if "do" not in frame:
        time.sleep(COMPILE_SECONDS)
        return {"status": "ok", "code": json.dumps(frame["config"]), "compile_ns": 5}
    if frame["do"] == "begin":
        return {"policy": "eager_warm"}
    time.sleep(ATTEMPT_SECONDS)
    if frame["do"] == "attempt":
        return {"verdict": {"status": "ok"}, "samples": [time_ns(frame["config"])] * 5}
    return {"samples": [[time_ns(one["config"])] * 7 for one in frame["entries"]]}


def main() -> None:
    """Answer until the pipe ends."""
    is_first = True
    for line in sys.stdin:
        frame = json.loads(line)
        print(json.dumps({"ready": True} if is_first else answer(frame)), flush=True)
        is_first = False


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        main()
    os._exit(0)
