"""Long trials of what must not break: damaged files, kills, long sound, full disks, closed pipes.

`python scripts/robustness.py [mutated|kills|hours|writers ...]` runs those named, or all: about an
hour on two cores. Each prints a line, and the exit code is 1 if one failed. They take too long for
the tests, which have the same in small.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_audio_fuzz import READ_ALL, mutate  # noqa: E402
from test_reading import container, muxed  # noqa: E402

from audio_files import encode, noise  # noqa: E402
from tiny_model import save_tiny  # noqa: E402

SCORE = [sys.executable, "-m", "artifactnet_jax", "score", "-q", "--backend", "numpy"]
MUTATED, KILLS, HOURS = 1_000, 40, 10


def _kinds() -> dict[str, bytes]:
    """A small file of each of 18 formats."""
    pcm = noise(1.5)
    kinds = {k: encode(pcm, k) for k in ("wav", "flac", "aiff", "ogg", "mp3", "m4a", "aac")}
    kinds["opus"] = encode(noise(1.5, 48_000), "opus", 48_000)
    kinds |= {k.lower(): container(pcm, k) for k in ("CAF", "AU", "W64", "RF64")}
    for name, form, codec in (
        *(("mka", "matroska", "flac"), ("oga", "ogg", "flac"), ("tta", "tta", "tta")),
        *(("alac.m4a", "ipod", "alac"), ("wma", "asf", "wmav2"), ("ts", "mpegts", "aac")),
    ):
        kinds[name] = muxed(form, codec, pcm)
    return kinds


def mutated(folder: Path) -> str:
    """Damaged files of all kinds give finite samples or an AudioError."""
    rng = np.random.default_rng(0)
    kinds, outcomes = _kinds(), Counter[str]()
    each = -(-MUTATED // len(kinds))
    for name, data in kinds.items():
        paths = []
        for k in range(each):
            path = folder / f"{k}.{name}"
            path.write_bytes(mutate(data, rng))
            paths.append(str(path))
        run = [sys.executable, "-W", "error", "-c", READ_ALL, *paths]
        done = subprocess.run(run, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{name}: after {done.stdout[-100:]}: {done.stderr[-1000:]}"
        assert done.stderr == "", f"{name}: {done.stderr[-300:]}"
        outcomes.update(line.rsplit(" ", 1)[-1] for line in done.stdout.splitlines())
    told = ", ".join(f"{kind} {count}" for kind, count in outcomes.most_common())
    return f"{outcomes.total()} files of {len(kinds)} formats: {told}"


def kills(folder: Path) -> str:
    """Killed again and again, `score --resume` ends with one row for each file."""
    weights, out = save_tiny(folder / "tiny.safetensors"), folder / "rows.jsonl"
    music = folder / "music"
    music.mkdir()
    for k in range(60):
        (music / f"{k}.flac").write_bytes(encode(noise(9, seed=k), "flac"))
    run = [*SCORE, "--weights", str(weights), "--format", "jsonl", "--resume", "-o", str(out)]
    killed, chance = 0, random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([*run, str(music)])
        try:
            process.wait(0.5 + 2 * chance.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert subprocess.run([*run, str(music)]).returncode == 0
    rows = Counter(json.loads(line)["path"] for line in out.read_text().splitlines())
    assert len(rows) == 60, f"{len(rows)} rows for 60 files"
    assert set(rows.values()) == {1}, "rows are there twice"
    return f"{killed} kills in {KILLS} runs: 60 rows, each once"


PEAK = """
import re, sys
from pathlib import Path
from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.config import FrontEnd, Decision
sum(1 for _ in SegmentReader(sys.argv[1], FrontEnd(), Decision(), "all"))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


def hours(folder: Path) -> str:
    """Memory does not grow with the length, in formats that are walked over beforehand too."""
    told = []
    for kind, rate in (("mp3", 44_100), ("ogg", 44_100), ("flac", 44_100), ("wav", 22_050)):
        minute = encode(noise(60, rate, channels=1), kind, rate)
        peaks = []
        for minutes in (10, 60 * HOURS):
            path = folder / f"a.{kind}"
            if kind == "wav":
                body = minute[44:] * minutes
                sizes = (len(body) + 36).to_bytes(4, "little"), len(body).to_bytes(4, "little")
                path.write_bytes(minute[:4] + sizes[0] + minute[8:40] + sizes[1] + body)
            else:
                with open(path, "wb") as file:  # one file behind another
                    for _ in range(minutes):
                        file.write(minute)
            run = [sys.executable, "-c", PEAK, str(path)]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout) / 1024)
            path.unlink()
        assert peaks[1] <= 1.25 * peaks[0], f"{kind}: {peaks} MB"
        told.append(f"{kind} {peaks[0]:.0f} -> {peaks[1]:.0f} MB")
    return f"10 minutes and {HOURS} hours: {', '.join(told)}"


def writers(folder: Path) -> str:
    """A full disk or a closed pipe ends the command with a line and no traceback."""
    weights, track = save_tiny(folder / "tiny.safetensors"), folder / "a.wav"
    track.write_bytes(encode(noise(5), "wav"))
    count = 0
    for form in ("table", "csv", "json", "jsonl"):
        run = [*SCORE, "--weights", str(weights), "--format", form, str(track)]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1, f"{form}: {done.returncode}"
        assert re.fullmatch("artifactnet-jax: cannot write .*No space left.*\\n", done.stderr), form
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as closed:
            done = subprocess.run(run, stdout=closed, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, ""), f"{form}: {done.stderr[-300:]}"
        count += 2
    return f"{count} writers on full disks and closed pipes"


TRIALS: dict[str, Callable[[Path], str]] = {
    each.__name__: each for each in (mutated, kills, hours, writers)
}


def main() -> int:
    """Run the trials that are named; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=", ".join(TRIALS))
    code = 0
    for name in parser.parse_args().trials or TRIALS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                told = TRIALS[name](Path(folder))
            except AssertionError as error:
                code, told = 1, f"FAILED: {error}"
        print(f"{name} ({time.monotonic() - began:.0f} s): {told}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
