"""Tables (Markdown) and plots (SVG) of what `bench throughput` measured."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError

STAGES = (
    *(
        "decode",
        "resample",
        "decoders",
        "transfer",
        "stft",
        "unet",
        "hpss",
        "texture",
        "cnn",
        "other",
    ),
    "aggregate",
)

# --- Tables ---------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> str:
    """Everything that a report shows, as Markdown."""
    parts = [_machine(found)]
    if "candidates" in found:
        parts += [_speed(found), _comparisons(found), _stages(found), _roofline(found)]
    if found.get("cold"):
        parts.append(_cold(found))
    if "scaling" in found:
        parts.append(_scaling(found))
    failed = [row["path"] for row in found.get("tracks", ()) if "error" in row]
    if failed:
        parts.append(f"{len(failed)} tracks could not be read.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return _figures(value) if isinstance(value, float) else str(value)


def _figures(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent where that reads well."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"


def _cores(n: int | str) -> str:
    return f"{n} core{'' if str(n) == '1' else 's'}"


def _machine(found: Mapping[str, Any]) -> str:
    here, weights = found["machine"], found["weights"]
    load = here["load_average"]
    items = [
        here["board"] or here["cpu"] or here["architecture"],
        _cores(here["cores"]),
        f"{here['memory_bytes'] / 2**30:.0f} GiB" if here["memory_bytes"] else None,
        *here["gpus"],
        here["power_mode"],
        f"load average at the start {load[0]:.1f}" if load else None,
    ]
    packages = {k: v for k, v in found["versions"].items() if v}
    shown = ("python", "artifactnet-jax", "numpy", "jax", "onnxruntime", "tensorrt", "torch")
    listed = ", ".join(f"{name} {packages[name]}" for name in shown if name in packages)
    settings = found["settings"]
    scenario = f"scenario {settings['scenario']}, {settings['rounds']} rounds"
    how = "Medians over the rounds, in which the candidates take turns."
    if settings["scenario"] == "scaling":
        scenario, how = "scenario scaling", "A process of `score` each, timed once."
    if found.get("tracks"):
        good = [row for row in found["tracks"] if "error" not in row]
        seconds = sum(row["duration_s"] for row in good)
        scenario += f", {len(good)} {settings['audio']} tracks of {seconds:.0f} s in all"
    random = ", random" if weights["random"] else ""
    return (
        f"{', '.join(item for item in items if item)}; {listed}; commit "
        f"{(found['commit'] or 'unknown')[:12]}; weights {weights['name']} ({weights['preset']}"
        f"{random}); {scenario}. {how}"
    )


def _speed(found: Mapping[str, Any]) -> str:
    rows = found["candidates"]
    latency = [name for name in ("track_s",) if any(name in row for row in rows)]
    head = ["", "batch", "x real time", "tracks/hour", "ms per segment", "one segment alone, ms"]
    head += ["a track, s: p50 / p90 / p99"] if latency else []
    head += ["cores used", "start, s"]
    power = any("watts" in row for row in rows)
    head += ["W", "J per segment"] if power else []

    def spread(values: Mapping[str, float] | None) -> str:
        return "-" if not values else " / ".join(_figures(values[p]) for p in ("p50", "p90", "p99"))

    body = []
    for row in rows:
        cells = [row["name"], row["batch"], row["times_real_time"], row["tracks_per_hour"]]
        cells += [row["ms_per_segment"], spread(row["segment_ms"])]
        cells += [spread(row.get("track_s"))] if latency else []
        used = f"{row['utilisation'] * row['cores']:.2f} of {row['cores']}"
        cells += [used, row["build_s"] + row["first_call_s"]]
        cells += [row.get("watts"), row.get("joules_per_segment")] if power else []
        body.append(cells)
    return _table(head, body)


def _comparisons(found: Mapping[str, Any]) -> str:
    head = ["", "times as fast as", "median", "lowest", "highest", "flips", "score differs by"]
    head += ["a segment's by"]
    body = []
    for row in found["comparisons"]:
        speed, same = row["speed"], row["parity"]
        cells = [row["over"], row["of"], speed["median"], speed["min"], speed["max"]]
        cells += [f"{same['flips']} of {same['tracks']}"]
        body.append([*cells, same["track_score"], same["segment_score"]])
    return _table(head, body) if body else ""


def stage_ms(found: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds per segment by stage, reading included; empty where they are not known."""
    if not row.get("stages"):
        return {}
    length_s = found["segment_s"]
    reading = {name: 1000 * s * length_s for name, s in found["reading_s_per_s"].items()}
    known = reading | row["stages"]["ms"]
    return {name: known[name] for name in STAGES if name in known}


def _stages(found: Mapping[str, Any]) -> str:
    rows = [(row, stage_ms(found, row)) for row in found["candidates"]]
    names = [name for name in STAGES if any(name in ms for _, ms in rows)]
    head = ["ms per segment", *names, "the model's call"]
    body = []
    for row, ms in rows:
        if ms:
            label = f"{row['name']} ({_cores(row['stages']['threads'])})"
            body.append([label, *(ms.get(name) for name in names), row["stages"]["call_ms"]])
    return _table(head, body) if body else ""


def _roofline(found: Mapping[str, Any]) -> str:
    head = ["", "part", "cores", "GFLOP/s", "of peak", "GB/s", "of peak", "FLOP/byte"]
    head += ["of what is attainable", "bound by"]
    body = []
    for row in found["candidates"]:
        for part in row.get("roofline") or ():
            cells = [row["name"], part["part"], part["threads"], part["gflops"]]
            cells += [f"{part['of_peak']:.0%}", part["gbytes_per_s"]]
            cells += [f"{part['of_bandwidth']:.0%}", part["flop_per_byte"]]
            body.append([*cells, f"{part['of_attainable']:.0%}", part["bound"]])
    if not body:
        return ""
    peaks = "; ".join(
        f"{_cores(n)}: {peak['gflops']:.0f} GFLOP/s, {peak['gbytes_per_s']:.1f} GB/s"
        for n, peak in found["limits"].items()
    )
    return f"{_table(head, body)}\n\nMeasured peaks: {peaks}."


def _cold(found: Mapping[str, Any]) -> str:
    head = ["score on one 10 s file, whole process", "CPU s", "imports alone, CPU s", "ratio"]
    head += ["wall s", "ratio", "memory, MiB"]
    body = []
    for row in found["cold"]:
        if "error" in row:
            body.append([row["backend"], row["error"], *[None] * 5])
            continue
        cells = [row["backend"], row["cpu_s"], row["baseline_cpu_s"], row["cpu_ratio"]["median"]]
        cells += [row["wall_s"], row["wall_ratio"]["median"], row["peak_bytes"] / 2**20]
        body.append(cells)
    return _table(head, body)


def _scaling(found: Mapping[str, Any]) -> str:
    head = ["", "files", "minutes", "wall s", "x real time", "CPU s", "cores used"]
    head += ["memory, MiB"]
    body = []
    for row in found["scaling"]:
        cells = [row["backend"], row["files"], float(row["minutes"])]
        if "error" in row:
            body.append([*cells, row["error"], *[None] * 4])
            continue
        wall, cpu = row["wall_s"], row["cpu_s"]
        speed = 60 * row["minutes"] / wall
        body.append([*cells, wall, speed, cpu, cpu / wall, row["peak_bytes"] / 2**20])
    return _table(head, body)


# --- Plots ----------------------------------------------------------------------------------------


def check(folder: str) -> None:
    """CommandError where plots cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        cure = "pip install 'artifactnet-jax[bench]'"
        raise CommandError(f"--plots needs matplotlib: {cure}", NO_BACKEND)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise CommandError(f"--plots {folder}: not a folder: name a folder", USAGE)


def plots(found: Mapping[str, Any], folder: str) -> list[str]:
    """Write the plots that the figures allow, and return their paths."""
    os.makedirs(folder, exist_ok=True)
    wanted: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
        "speed": _plot_speed,
        "stages": _plot_stages,
        "roofline": _plot_roofline,
        "scaling-length": _plot_length,
        "scaling-files": _plot_files,
    }
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "artifactnet-jax", "svg.fonttype": "none"}):
        for name, draw in wanted.items():
            figure = Figure(figsize=(7, 3.5), layout="constrained")
            if draw(figure, found):
                path = os.path.join(folder, f"{name}.svg")
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
    return written


def _plot_speed(figure: Any, found: Mapping[str, Any]) -> bool:
    rows = found.get("candidates", [])
    if not rows:
        return False
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    values = [row["times_real_time"] for row in rows]
    bars = axes.barh(names, values, color=["C7" if row["peer"] else "C0" for row in rows])
    axes.bar_label(bars, [_figures(value) for value in values], padding=3)
    axes.set_xlabel("x real time, from file to verdict")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    return True


def _plot_stages(figure: Any, found: Mapping[str, Any]) -> bool:
    rows = [(row, stage_ms(found, row)) for row in found.get("candidates", ())]
    rows = [(row, ms) for row, ms in rows if ms]
    if not rows:
        return False
    axes = figure.subplots()
    labels = [f"{row['name']}\n{_cores(row['stages']['threads'])}" for row, _ in rows]
    left = [0.0] * len(rows)
    for name in STAGES:
        widths = [ms.get(name, 0.0) for _, ms in rows]
        if any(widths):
            axes.barh(labels, widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(f"ms per {found['segment_s']:g} s segment, by stage")
    axes.legend(fontsize="small", ncols=2)
    axes.invert_yaxis()
    return True


def _plot_roofline(figure: Any, found: Mapping[str, Any]) -> bool:
    parts = [
        (f"{row['name']}: {part['part']}", part)
        for row in found.get("candidates", ())
        for part in row.get("roofline") or ()
    ]
    if not parts:
        return False
    axes = figure.subplots()
    intensities = [part["flop_per_byte"] for _, part in parts]
    span = (min(intensities) / 10, max(intensities) * 10)
    for k, (threads, peak) in enumerate(found["limits"].items()):
        ridge = peak["gflops"] / peak["gbytes_per_s"]
        x = sorted({span[0], min(max(ridge, span[0]), span[1]), span[1]})
        y = [min(peak["gflops"], value * peak["gbytes_per_s"]) for value in x]
        axes.plot(
            x, y, color="black", linestyle=("--", "-")[k % 2], label=f"peak, {_cores(threads)}"
        )
    for k, (label, part) in enumerate(parts):
        marker = {"total": "o", "unet": "s", "cnn": "^"}[part["part"]]
        of = (part["flop_per_byte"], part["gflops"])
        axes.plot(*of, marker, color=f"C{k % 10}", label=f"{label}, {_cores(part['threads'])}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="GFLOP/s")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _plot_length(figure: Any, found: Mapping[str, Any]) -> bool:
    return _plot_scaling(figure, found, "length", "minutes", "length of the track, minutes")


def _plot_files(figure: Any, found: Mapping[str, Any]) -> bool:
    return _plot_scaling(figure, found, "files", "files", "files of 4 s")


def _plot_scaling(figure: Any, found: Mapping[str, Any], over: str, key: str, label: str) -> bool:
    rows = [row for row in found.get("scaling", ()) if row["over"] == over and "error" not in row]
    if not rows:
        return False
    time, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == name]
        x = [row[key] for row in own]
        time.plot(x, [row["wall_s"] for row in own], "o-", label=name)
        memory.plot(x, [row["peak_bytes"] / 2**20 for row in own], "o-", label=name)
    time.set(xscale="log", yscale="log", xlabel=label, ylabel="time of the process, s")
    memory.set(xscale="log", xlabel=label, ylabel="its peak memory, MiB")
    memory.set_ylim(bottom=0)
    time.legend(fontsize="small")
    return True
