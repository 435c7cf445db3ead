"""The machine under a benchmark: what it is, its measured peaks, its power, and child processes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

import artifactnet_jax
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.doctor import PACKAGES, first_line

MATRIX = 2048  # rows and columns of the product whose rate is the peak
COPY_BYTES = 128 << 20  # of each thread's source: beyond any cache
DEVICE_MATRIX = 8192
DEVICE_COPY_BYTES = 1 << 30
PEAK_ROUNDS = 5

# --- What it is -----------------------------------------------------------------------------------


def _said(*command: str) -> str:
    """What a command prints; empty where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name as the system has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Hardware"):
                    return value.strip()
    except OSError:
        pass
    return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, board; the load average of the last minutes."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    query = "--query-gpu=name,driver_version,memory.total"
    gpus = _said("nvidia-smi", query, "--format=csv,noheader").splitlines()
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cores": cpu_count(),  # that this process may use
        "affinity": affinity,
        "memory_bytes": memory,
        "gpus": gpus,  # name, driver, memory
        "board": first_line("/proc/device-tree/model"),
        "jetson_linux": first_line("/etc/nv_tegra_release"),
        "power_mode": " ".join(_said("nvpmodel", "-q").split()) or None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str | None]:
    """Python, this package, and the packages that speed depends on."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "artifactnet-jax": artifactnet_jax.__version__,
    }
    for package in (*PACKAGES, "tensorrt-rtx", "cuda-python", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that the package runs from, "+" if files differ; None elsewhere."""
    root = Path(artifactnet_jax.__file__).resolve().parent.parent
    git = ("git", "-C", str(root))
    if _said(*git, "rev-parse", "--show-toplevel") != str(root):
        return None  # installed, perhaps inside somebody else's checkout
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no")
    return _said(*git, "rev-parse", "HEAD") + ("+" if changed else "")


# --- What it can do -------------------------------------------------------------------------------


def _best(action: Callable[[], Any], rounds: int) -> float:
    """Least seconds of several runs, after one that is not counted."""
    action()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return min(taken)


def peaks(
    threads: int, matrix: int = MATRIX, copy_bytes: int = COPY_BYTES, rounds: int = PEAK_ROUNDS
) -> dict[str, float]:
    """Highest rates that NumPy reaches here: {"threads", "gflops", "gbytes_per_s"}.

    gflops: a float32 product of square matrices in BLAS, 2 n^3 operations. gbytes_per_s: every
    thread copies an array of its own; what is read and what is written both count (STREAM "copy").
    """
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((matrix, matrix), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    with threadpool_limits(threads, user_api="blas"):
        product_s = _best(lambda: np.matmul(a, b, out=out), rounds)
    sources = [np.ones(copy_bytes // 4, np.float32) for _ in range(threads)]
    targets = [np.zeros_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        copy_s = _best(lambda: list(pool.map(np.copyto, targets, sources)), rounds)
    moved = 2 * sum(source.nbytes for source in sources)
    return {
        "threads": threads,
        "gflops": 2 * matrix**3 / product_s / 1e9,
        "gbytes_per_s": moved / copy_s / 1e9,
    }


def device_peaks(
    matrix: int = DEVICE_MATRIX, copy_bytes: int = DEVICE_COPY_BYTES, rounds: int = PEAK_ROUNDS
) -> dict[str, Any]:
    """The same of jax's first device, the products also in TF32 (where it has that) and bfloat16.

    {"device", "gflops", "gflops_tf32", "gflops_bfloat16", "gbytes_per_s"}.
    """
    import jax
    import jax.numpy as jnp

    def rate(dtype: Any, precision: Any) -> float:
        x = jnp.ones((matrix, matrix), dtype)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        return 2 * matrix**3 / _best(lambda: product(x, x).block_until_ready(), rounds) / 1e9

    data = jnp.ones(copy_bytes // 4, jnp.float32)
    negated = jax.jit(jnp.negative)  # a plain copy might be left out
    copy_s = _best(lambda: negated(data).block_until_ready(), rounds)
    return {
        "device": jax.devices()[0].device_kind,
        "gflops": rate(jnp.float32, jax.lax.Precision.HIGHEST),
        "gflops_tf32": rate(jnp.float32, jax.lax.Precision.DEFAULT),
        "gflops_bfloat16": rate(jnp.bfloat16, jax.lax.Precision.DEFAULT),
        "gbytes_per_s": 2 * data.nbytes / copy_s / 1e9,
    }


# --- Power ----------------------------------------------------------------------------------------


class Energy:
    """A counter of joules: NVML's of all GPUs, or tegrastats' power integrated over time.

    `joules()` is None where neither is there (`source` then is ""). To be closed.
    """

    PERIOD_MS = 100  # of tegrastats

    def __init__(self) -> None:
        self.source = ""
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._stats: subprocess.Popen[str] | None = None
        self._total, self._at = 0.0, 0.0  # joules so far, when
        if util.find_spec("pynvml") is not None:
            self._open_nvml()
        if not self.source and shutil.which("tegrastats"):
            self._open_tegrastats()

    def _open_nvml(self) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            for handle in self._handles:
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:  # no driver, or a GPU without a counter
            return
        self._nvml, self.source = pynvml, "nvml"

    def _open_tegrastats(self) -> None:
        command = ["tegrastats", "--interval", str(self.PERIOD_MS)]
        try:
            self._stats = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return
        self.source, self._at = "tegrastats", time.perf_counter()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self._stats is not None
        for line in self._stats.stdout or ():
            now, watts = time.perf_counter(), tegrastats_watts(line)
            self._total += (watts or 0.0) * (now - self._at)
            self._at = now

    def joules(self) -> float | None:
        """Joules since some moment before: only differences mean anything."""
        if self._nvml is not None:
            of = self._nvml.nvmlDeviceGetTotalEnergyConsumption
            return sum(float(of(handle)) for handle in self._handles) / 1000
        return self._total if self._stats is not None else None

    def close(self) -> None:
        """Stop what measures."""
        if self._stats is not None:
            self._stats.kill()
            self._stats.wait()
            self._reader.join()
            if self._stats.stdout is not None:
                self._stats.stdout.close()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


def tegrastats_watts(line: str) -> float | None:
    """Power of the whole board in a line of tegrastats, in watts; None where it tells none."""
    found = re.search(r"\b(?:VDD_IN|POM_5V_IN|SYS5V0|VIN) (\d+)(?:mW)?/", line)
    return int(found[1]) / 1000 if found else None


# --- Child processes ------------------------------------------------------------------------------

# The largest memory of a child counts what its parent held when it was started. So a small process
# of its own starts it.
_LAUNCHER = """
import json, os, sys, time
null = os.open(os.devnull, os.O_RDWR)
began = time.perf_counter()
actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
_, status, used = os.wait4(pid, 0)
print(json.dumps({
    "code": os.waitstatus_to_exitcode(status),
    "wall_s": time.perf_counter() - began,
    "cpu_s": used.ru_utime + used.ru_stime,
    "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
}))
"""


def child(arguments: list[str]) -> dict[str, Any]:
    """Run this Python with arguments: {"code", "wall_s", "cpu_s", "peak_bytes", "error"}.

    Wall and processor time of the whole process, its largest resident memory, and the last line
    that it wrote to stderr. Needs a POSIX system: OSError elsewhere.
    """
    if not hasattr(os, "posix_spawn"):
        raise OSError("whole processes are measured on POSIX systems only")
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise OSError(f"cannot start {sys.executable}: {done.stderr.strip()[-200:]}")
    lines = done.stderr.strip().splitlines()
    return {**json.loads(done.stdout), "error": lines[-1] if lines else ""}
