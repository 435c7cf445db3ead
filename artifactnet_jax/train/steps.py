"""The steps of a run, and all that is kept of them: checkpoints, metrics and curves."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from artifactnet_jax.console.progress import Teller, step_progress
from artifactnet_jax.data.records import Examples, batches
from artifactnet_jax.evaluation import auc
from artifactnet_jax.files import replace_file
from artifactnet_jax.results import to_json
from artifactnet_jax.text import SOME_FAILED, CommandError, brief
from artifactnet_jax.train.loop import State, Trainer
from artifactnet_jax.train.phases import Settings

WATCHED = "validation"  # value of a manifest's column `split`, key of metrics
STARVED = 0.3  # share of the time spent waiting for batches above which to say so


class Loop:
    """The steps of a run: checkpoints, metrics, and the watch over a mask that collapses."""

    def __init__(self, folder: Path, trainer: Trainer, settings: Settings, tell: Teller):
        self.folder, self.trainer, self.settings, self.tell = folder, trainer, settings, tell
        self.last: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self._saved: int | None = None
        self._collapsed_for = 0
        self._stop = 0  # number of the signal that asked for it
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with full_disk(folder):
            self._manager = ocp.CheckpointManager(
                (folder / "checkpoints").resolve(), options=options
            )

    def close(self) -> None:
        """Close the checkpoints' manager."""
        self._manager.close()

    def run(self, examples: Examples, looks: list[Any], jobs: int) -> State:
        """From the last checkpoint, or the start, to the last step."""
        settings, state = self.settings, self._restore()
        done = int(state.step)
        if done >= settings.steps:
            self.tell(f"{self.folder}: all {done} steps were done")
            return state
        self.tell(f"step {done} of {settings.steps}")
        with (
            _signals(self._on_signal),
            contextlib.closing(
                batches(examples, settings.batch, start=done, workers=jobs)
            ) as source,
            step_progress(self.tell, done, settings.steps) as bar,
            ThreadPoolExecutor(1) as clock,
        ):
            pending: list[tuple[int, dict[str, Any], np.ndarray]] = []
            idle, began = 0.0, time.perf_counter()
            finished: Future[float] | None = None  # when the device was done with the last step
            for step in range(done + 1, settings.steps + 1):
                batch = next(source)
                label = batch["label"]
                names = [name for name in batch if name != "row"]
                arrays = self.trainer.put({name: batch[name] for name in names})
                ready = time.perf_counter()
                if finished is not None:
                    idle += max(0.0, ready - finished.result())
                state, metrics = self.trainer.step(state, arrays)
                finished = clock.submit(_when_ready, metrics["loss"])
                pending.append((step, metrics, label))
                bar(step)
                last = step == settings.steps
                stop = bool(self._stop) and not last  # asked once: a signal may come at any time
                save = step % settings.checkpoint_every == 0 or last or stop
                if step == done + 1:  # compiled: what follows is what a step takes
                    finished.result()
                    idle, began = 0.0, time.perf_counter()
                if step % settings.log_every == 0 or save:
                    pending = self._log(pending, idle, time.perf_counter() - began)
                    idle, began = 0.0, time.perf_counter()
                if step % settings.watch_every == 0 or last:
                    self._look(step, state, looks)
                if save:
                    self._save(step, state)
                if step % settings.watch_every == 0 or save:  # no part of what a step takes
                    finished, began = None, time.perf_counter()
                if stop:
                    self.plot()
                    self.tell(f"stopped at step {step}: the same command goes on from there")
                    raise KeyboardInterrupt
        return state

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = number

    def _restore(self) -> State:
        """The last checkpoint, and metrics cut back to it."""
        state = self.trainer.initial()
        step = self._manager.latest_step()
        rows: list[dict[str, Any]] = []
        path = self.folder / "metrics.jsonl"
        if step is not None:
            leaves, tree = jax.tree.flatten(state)
            kinds = [
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.trainer.replicated)
                for leaf in leaves
            ]
            try:
                found = self._manager.restore(step, args=ocp.args.StandardRestore(_numbered(kinds)))
            except Exception as error:
                cause = f"{self.folder}/checkpoints/{step}: cannot be restored ({brief(error)})"
                cure = "delete that checkpoint to go on from the one before"
                raise CommandError(f"{cause}: {cure}", SOME_FAILED) from error
            state = jax.tree.unflatten(tree, [found[name] for name in _numbered(leaves)])
            self._saved = step
            with contextlib.suppress(FileNotFoundError):
                for line in path.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError):  # torn by a kill
                        rows.append(json.loads(line))
        rows = [row for row in rows if row["step"] <= (step or 0)]
        for row in rows:
            if WATCHED in row:
                self.validation = {"step": row["step"], **row[WATCHED]}
            else:
                self.last = row
        with full_disk(self.folder):
            replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return state

    def _save(self, step: int, state: State) -> None:
        with full_disk(self.folder, self._saved):
            values = _numbered(jax.tree.leaves(state))
            self._manager.save(step, args=ocp.args.StandardSave(values))
        self._saved = step

    def _write(self, row: dict[str, Any]) -> None:
        path = self.folder / "metrics.jsonl"
        with full_disk(self.folder, self._saved), open(path, "a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")

    def _log(self, pending: list[Any], idle: float, seconds: float) -> list[Any]:
        """One row of the steps since the last one; CommandError if they went wrong."""
        names = [name for name in pending[0][1] if name != "logit"]
        means: dict[str, Any] = {}
        for step, metrics, _ in pending:
            for name in ("loss", "gradient"):
                if not math.isfinite(float(metrics[name])):
                    self._bad(step, name)
        for name in names:
            means[name] = float(np.mean([float(metrics[name]) for _, metrics, _ in pending]))
        step = pending[-1][0]
        if "logit" in pending[0][1]:
            logits = [np.asarray(metrics["logit"]) for _, metrics, _ in pending]
            labels = [
                np.repeat(label, logit.shape[1])
                for (_, _, label), logit in zip(pending, logits, strict=True)
            ]
            means["auc"] = auc(np.concatenate(labels), np.concatenate([x.ravel() for x in logits]))
        segments = self.settings.batch * max(1, len(self.settings.versions))
        speed = len(pending) / seconds if seconds > 0 else 0.0
        waiting = min(1.0, idle / seconds) if seconds > 0 else 0.0
        self.last = {
            "step": step,
            **means,
            "steps_per_s": round(speed, 3),
            "segments_per_s": round(speed * segments, 3),
            "waiting": round(waiting, 3),
        }
        self._write(self.last)
        shown = " ".join(f"{k} {v:.4g}" for k, v in self.last.items() if v is not None)
        self.tell(shown)
        if waiting > STARVED:
            cure = "raise workers, or set draws=N to keep N changed crops per track on disk"
            self.tell(f"waiting for batches {waiting:.0%} of the time: {cure}")
        self._watch_collapse(len(pending))
        return []

    def _bad(self, step: int, name: str) -> None:
        kept = "no checkpoint was kept yet"
        if self._saved is not None:
            kept = f"the checkpoint of step {self._saved} is the last good one"
        cure = "lower rate or clip, or set another seed, in another --out"
        cause = f"{self.folder}: {name} is not finite at step {step}"
        raise CommandError(f"{cause}; {kept}: {cure}", SOME_FAILED)

    def _watch_collapse(self, steps: int) -> None:
        """CommandError once the mask has passed all, or nothing, or no detail, for too long."""
        if "mask_mean" not in self.last:
            return
        unet, s = self.trainer.config.unet, self.settings
        bound = unet.mask_max or 1.0
        mean, spread = self.last["mask_mean"] / bound, self.last["mask_spread"] / bound
        problem = ""
        if mean > s.mask_high:
            problem = f"pass-through: the mask is {mean:.1%} of its bound on average"
        elif mean < s.mask_low:
            problem = f"the mask has closed: {mean:.2%} of its bound on average"
        elif spread < s.mask_spread:
            problem = f"a constant mask: it varies by {spread:.2%} of its bound within a segment"
        self._collapsed_for = self._collapsed_for + steps if problem else 0
        if self._collapsed_for >= s.patience:
            cause = f"{self.folder}: collapse at step {self.last['step']}, {problem}"
            cure = "start from distilled weights, lower rate, or give the data more variety"
            self.plot()
            raise CommandError(f"{cause}: {cure}", SOME_FAILED)

    def _look(self, step: int, state: State, looks: list[Any]) -> None:
        """A row on the validation tracks, by the averaged weights."""
        if not looks:
            return
        losses, labels, logits = [], [], []
        for batch, n in looks:
            metrics = self.trainer.watch(state, batch)
            losses.append((float(metrics["loss"]), n))
            if "logit" in metrics:
                logits.append(np.asarray(metrics["logit"])[:n])
                labels.append(batch["label"][:n])
        found: dict[str, Any] = {
            "tracks": sum(n for _, n in losses),
            "loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses),
        }
        if logits:
            logit = np.concatenate(logits)
            label = np.concatenate(labels)
            found["auc"] = auc(np.repeat(label, logit.shape[1]), logit.ravel())
            if logit.shape[1] > 1:
                p = 1 / (1 + np.exp(-np.clip(logit.astype(np.float64), -500, 500)))
                delta = p.max(axis=1) - p.min(axis=1)
                for name, value in (("real", 0), ("ai", 1)):
                    if (label == value).any():
                        found[f"delta_{name}"] = float(delta[label == value].mean())
        self.validation = {"step": step, **found}
        self._write({"step": step, WATCHED: found})
        shown = " ".join(f"{k} {v:.4g}" for k, v in found.items() if v is not None)
        self.tell(f"step {step} validation: {shown}")

    def plot(self) -> None:
        """curves.png from metrics.jsonl."""
        from matplotlib.figure import Figure

        with open(self.folder / "metrics.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        steps = [row for row in rows if WATCHED not in row]
        looks = [row for row in rows if WATCHED in row]
        figure = Figure(figsize=(12, 3.2), layout="constrained")
        loss, auc, mask = figure.subplots(1, 3)
        series = (
            (loss, steps, "loss", "training"),
            (auc, steps, "auc", "training"),
            (mask, steps, "mask_mean", "mean mask"),
            (mask, steps, "mask_spread", "its spread"),
            (mask, steps, "residual_energy", "residual energy"),
        )
        for axis, source, name, label in series:
            points = [(row["step"], row[name]) for row in source if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        for axis, name in ((loss, "loss"), (auc, "auc")):
            points = [(r["step"], r[WATCHED][name]) for r in looks if r[WATCHED].get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=WATCHED)
        for axis, title in ((loss, "loss"), (auc, "AUC"), (mask, "mask")):
            axis.set(title=title, xlabel="step")
            if axis.lines:
                axis.legend()
        with full_disk(self.folder, self._saved):
            figure.savefig(self.folder / "curves.png", dpi=100)


def _when_ready(value: jax.Array) -> float:
    """The time at which the device has computed `value`."""
    value.block_until_ready()
    return time.perf_counter()


def _numbered(leaves: Sequence[Any]) -> dict[str, Any]:
    return {f"{k:05d}": leaf for k, leaf in enumerate(leaves)}


@contextlib.contextmanager
def full_disk(folder: Path, saved: int | None = None) -> Iterator[None]:
    """Turns the failure to write into the end of the command."""
    try:
        yield
    except OSError as error:
        cause = f"cannot write to {folder} ({error.strerror or brief(error)})"
    except ValueError as error:  # Orbax's own word for it
        if not any(word in str(error) for word in ("No space", "RESOURCE_EXHAUSTED", "Disk quota")):
            raise
        cause = f"cannot write to {folder} (No space left on device)"
    else:
        return
    kept = "" if saved is None else f"; the checkpoint of step {saved} is kept"
    cure = "free space, and give the same command again"
    raise CommandError(f"{cause}{kept}: {cure}", SOME_FAILED)


@contextlib.contextmanager
def _signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop after the step; only a main thread can be told."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, handler) for number in numbers]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
