"""Changes that keep the label: what happens to music on its way to a listener.

Real and AI tracks differ in codec, bandwidth, level and channels before they differ in anything of
interest. So one chain of changes, drawn without a look at the label, treats both classes alike: a
production part (speed, equaliser, mix to mono, clipping, band limit, noise, level), then a codec,
then the gain of a player. No change adds traces of its own that resemble a neural codec's: speed is
changed by resampling, which is linear, and not by a phase vocoder, whose frames smear the residue.
Inverted polarity is left out, since no magnitude shows it.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any, Literal, get_args

import av
import numpy as np
import soundfile
import soxr

from artifactnet_jax.audio import to_mono
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.recording import to_float

RATE = FrontEnd.sample_rate  # Hz
MARGIN = RATE // 10  # samples on either side of a crop that are changed along and then cut away
Codec = Literal["wav", "mp3", "aac", "opus"]
CODECS: tuple[Codec, ...] = get_args(Codec)  # of phase `codec`
PEAK = 0.99  # what a change of level leaves at most
QUIETER_DB = 20.0  # a mix this much below the mean of the channels is not used

# PyAV encoder, container, rate in Hz, sample format, largest kbit/s of a channel. The container
# states the encoder's delay, and the decoder drops it: AAC in ADTS would come 1024 samples late.
_ENCODERS = {
    "mp3": ("libmp3lame", "mp3", RATE, "fltp", 320),
    "aac": ("aac", "mp4", RATE, "fltp", 256),  # ISO 13818-7: 6144 bits a frame
    "opus": ("libopus", "ogg", 48_000, "flt", 256),
}
_MP3_KBPS = (64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # of MPEG-1 layer III, from 64
# libvorbis: kbit/s of a channel at qualities 0, 0.1, ... 1, without and with coupling
_VORBIS_KBPS = {
    1: (48, 60, 70, 80, 86, 96, 110, 120, 140, 160, 240),
    2: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 250),
}


def encode_decode(audio: np.ndarray, codec: str, kbps: int) -> np.ndarray:
    """What a listener gets of float32 audio [n] or [n, 1 or 2] at 44.1 kHz: same shape, aligned.

    codec: "wav" (16 bits, `kbps` means nothing), "mp3", "aac", "opus" or "vorbis"; kbps: kbit/s of
    all channels, or the nearest that the codec has. Audio beyond [-1, 1] is clipped first. Under
    1 ms a codec may have nothing to say.
    """
    audio = np.clip(audio, -1, 1)
    if codec == "wav":
        return to_float(to_int16(audio))
    pcm = np.ascontiguousarray(audio.reshape(len(audio), -1), np.float32)
    decoded = _vorbis(pcm, kbps) if codec == "vorbis" else _through_av(pcm, codec, kbps)
    return _fit(decoded, len(pcm)).reshape(audio.shape)


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Float in [-1, 1] -> int16 at 2^15, rounded: noise of -101 dBFS rms."""
    return np.clip(np.rint(audio * np.float32(32768)), -32768, 32767).astype(np.int16)


def _through_av(pcm: np.ndarray, codec: str, kbps: int) -> np.ndarray:
    """float32 [n, c] through a codec of PyAV, in memory; the end may be padded."""
    encoder, container, rate, form, most = _ENCODERS[codec]
    channels = pcm.shape[1]
    kbps = min(kbps, most * channels)
    if codec == "mp3":
        kbps = min(_MP3_KBPS, key=lambda known: abs(known - kbps))
    if rate != RATE:
        pcm = soxr.resample(pcm, RATE, rate, "VHQ")
    planes = pcm.T if form == "fltp" else pcm.reshape(1, -1)
    layout = "mono" if channels == 1 else "stereo"
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(encoder, rate=rate)
        stream.bit_rate, stream.layout, stream.format = 1000 * kbps, layout, form
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), form, layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r", format=container) as source:
        decoded = [frame.to_ndarray() for frame in source.decode(audio=0)]
    audio = np.concatenate(decoded, axis=1).T
    return audio if rate == RATE else soxr.resample(audio, rate, RATE, "VHQ")


def _vorbis(pcm: np.ndarray, kbps: int) -> np.ndarray:
    """float32 [n, c] through libvorbis, in memory."""
    channels = pcm.shape[1]
    quality = float(np.interp(kbps / channels, _VORBIS_KBPS[channels], np.linspace(0, 1, 11)))
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", RATE, channels, "VORBIS", format="OGG", compression_level=1 - quality
    ) as output:
        for start in range(0, len(pcm), 4096):  # long writes overflow the encoder's stack
            output.write(pcm[start : start + 4096])
    file.seek(0)
    audio: np.ndarray = soundfile.read(file, dtype="float32", always_2d=True)[0]
    return audio


def _fit(audio: np.ndarray, length: int) -> np.ndarray:
    """Cut at the end, or continued with zeros: [m, c] -> [length, c]."""
    short = length - len(audio)
    return audio[:length] if short <= 0 else np.pad(audio, ((0, short), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Changes as drawn for one crop. The default only takes the mean of the channels."""

    speed: float = 1.0  # above 1 faster and higher
    eq: tuple[tuple[str, float, float], ...] = ()  # "low" or "high" shelf or "peak"; Hz; dB
    left: float = 0.5  # share of the left channel in the mix to mono; 0 and 1 take one channel
    stereo: bool = False  # two channels go through the codec, their mean is taken behind it
    clip_db: float = 0.0  # what the peak exceeds the clipping level by
    soft: bool = False  # clipped by a tanh rather than cut off
    cutoff: float = 0.0  # Hz; 0 leaves the band as it is
    resampled: bool = False  # the band is limited by resampling down and up, not by a filter
    noise_db: float | None = None  # white noise, relative to the crop's rms
    noise_seed: int = 0
    level_db: float | None = None  # dBFS rms before the codec, less where the peak forbids it
    codecs: tuple[tuple[str, int], ...] = ()  # (codec, kbps) of each version; none: one, untouched
    gain_db: float = 0.0  # behind the codec

    def source_samples(self, n: int) -> int:
        """How many samples of the recording become `n` samples."""
        return int(np.ceil(n * self.speed))

    def apply(self, audio: np.ndarray) -> np.ndarray:
        """float32 [n, 1 or 2] -> mono versions, float32 [V, about n / speed], all aligned."""
        audio = self._produced(audio)
        gain = np.float32(10 ** (self.gain_db / 20))
        versions = [encode_decode(audio, *codec) for codec in self.codecs] or [audio]
        return np.stack([np.clip(to_mono(v) * gain, -1, 1) for v in versions])

    def level(self, audio: np.ndarray) -> np.float32:
        """The factor that brings audio to `level_db`, less where its peak would exceed PEAK."""
        peak = float(np.abs(audio).max(initial=0))
        if self.level_db is None:
            return np.float32(1 if peak <= 1 else PEAK / peak)
        factor = 10 ** (self.level_db / 20) / max(_rms(audio), 1e-9)
        return np.float32(min(factor, PEAK / max(peak, 1e-9)))

    def _produced(self, audio: np.ndarray) -> np.ndarray:
        """Everything before the codec: [n, c] -> [m, 1 or 2]."""
        if self.speed != 1:
            audio = soxr.resample(audio, RATE * self.speed, RATE, "HQ")
        if not self.stereo:
            mean = to_mono(audio)
            mix = self.left * audio[:, 0] + (1 - self.left) * audio[:, -1]
            quiet = _rms(mix) < _rms(mean) * 10 ** (-QUIETER_DB / 20)
            audio = (mean if quiet else mix)[:, None]
        if self.eq:
            audio = filtered(audio, lambda hz: np.prod([biquad(hz, *b) for b in self.eq], axis=0))
        if self.clip_db:
            top = np.float32(np.abs(audio).max(initial=0) * 10 ** (-self.clip_db / 20))
            if top:
                audio = top * np.tanh(audio / top) if self.soft else np.clip(audio, -top, top)
        if self.cutoff and self.resampled:
            low = 2.1 * self.cutoff  # Hz; soxr keeps 95 % of the band below half of it
            down = soxr.resample(audio, RATE, low, "HQ")
            audio = _fit(soxr.resample(down, low, RATE, "HQ"), len(audio))
        elif self.cutoff:
            audio = filtered(audio, lambda hz: low_pass(hz, self.cutoff))
        if self.noise_db is not None:
            noise = np.random.default_rng(self.noise_seed).standard_normal(audio.shape, np.float32)
            audio = audio + noise * np.float32(_rms(audio) * 10 ** (self.noise_db / 20))
        return (audio * self.level(audio)).astype(np.float32, copy=False)


def _rms(audio: np.ndarray) -> float:
    flat = audio.ravel()
    return math.sqrt(float(np.dot(flat, flat)) / max(flat.size, 1))


def filtered(audio: np.ndarray, response: Any) -> np.ndarray:
    """float32 [n, c] through a filter given by its frequency response, a function of Hz."""
    n = len(audio)
    size = -(-(n + MARGIN) // 4096) * 4096  # room for the filter's tail, and no large prime in it
    shape = response(np.fft.rfftfreq(size, 1 / RATE)).astype(np.complex64)
    spectrum = np.fft.rfft(audio, size, axis=0) * shape[:, None]
    return np.fft.irfft(spectrum, size, axis=0)[:n]


def low_pass(hz: np.ndarray, cutoff: float, width: float = 500.0) -> np.ndarray:
    """A steep zero-phase low-pass: 1 below `cutoff`, falling to 0 over `width`, both in Hz."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((hz - cutoff) / width, 0, 1))


def biquad(hz: np.ndarray, kind: str, centre: float, gain_db: float) -> np.ndarray:
    """Frequency response of one band of an equaliser (R. Bristow-Johnson's audio EQ cookbook).

    kind: "low" or "high" shelf of slope 1, or "peak" with a quality of 1; centre in Hz.
    """
    a, w = 10 ** (gain_db / 40), 2 * np.pi * centre / RATE
    cos, alpha = np.cos(w), np.sin(w) / (2 if kind == "peak" else np.sqrt(2))
    if kind == "peak":
        top = (1 + alpha * a, -2 * cos, 1 - alpha * a)
        bottom = (1 + alpha / a, -2 * cos, 1 - alpha / a)
    else:
        s = 1 if kind == "low" else -1
        root = 2 * np.sqrt(a) * alpha
        plus, minus = a + 1, s * (a - 1) * cos
        top = (
            a * (plus - minus + root),
            2 * a * (s * (a - 1) - (a + 1) * cos),
            a * (plus - minus - root),
        )
        bottom = (plus + minus + root, -2 * (s * (a - 1) + (a + 1) * cos), plus + minus - root)
    z = np.exp(-2j * np.pi * hz / RATE)
    above, below = (c[0] + c[1] * z + c[2] * z**2 for c in (top, bottom))
    response: np.ndarray = above / below
    return response


@dataclasses.dataclass(frozen=True)
class Augment:
    """Probability (`..._p`) and range of every change; the label is not among the arguments."""

    speed_p: float = 0.3
    speed: float = 0.03  # largest change of tempo and pitch together, either way
    eq_p: float = 0.4
    eq_bands: int = 3  # at most
    eq_db: float = 6.0  # largest gain or loss of a band
    one_channel_p: float = 0.1  # the left or the right channel alone
    random_mix_p: float = 0.1  # left and right in random shares
    stereo_p: float = 0.3  # stereo through the codec; the rest is mixed to mono before it
    clip_p: float = 0.1  # half of them soft
    clip_db: float = 6.0  # what the peak exceeds the clipping level by, at most
    band_p: float = 0.5  # half of them by resampling
    band_low: float = 5_000.0  # Hz
    band_high: float = 20_000.0  # Hz; the upper half of the range is preferred
    noise_p: float = 0.1
    noise_low: float = -70.0  # dB relative to the music's rms
    noise_high: float = -40.0
    level_p: float = 0.9
    level_low: float = -32.0  # dBFS rms
    level_high: float = -12.0
    gain_p: float = 0.3
    gain_low: float = -12.0  # dB behind the codec, up to 0
    wav: float = 0.25  # shares of the codecs
    mp3: float = 0.2
    aac: float = 0.2
    opus: float = 0.2
    vorbis: float = 0.15
    kbps_low: float = 64.0  # log-uniform; an Opus or AAC channel takes 256 at most
    kbps_high: float = 320.0

    def __post_init__(self) -> None:
        """ValueError, naming the setting, where one makes no sense."""
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if name.endswith("_p") and not 0 <= value <= 1:
                raise ValueError(f"augment.{name} = {value} is not a probability from 0 to 1")
            if name.endswith("_low") and value > (top := values.get(f"{name[:-4]}_high", 0.0)):
                raise ValueError(f"augment.{name} = {value} is above the upper end, {top}")
        shares = [values[codec] for codec in (*CODECS, "vorbis")]
        if min(shares) < 0 or not sum(shares):
            raise ValueError(f"augment.wav, .mp3, .aac, .opus, .vorbis = {shares} are no shares")
        if self.one_channel_p + self.random_mix_p + self.stereo_p > 1:
            raise ValueError(
                "augment.one_channel_p, .random_mix_p and .stereo_p sum to more than 1"
            )
        if not 0 <= self.speed < 0.5 or self.eq_bands < 1 or self.kbps_low <= 0:
            raise ValueError("augment.speed, .eq_bands or .kbps_low is out of range")
        if not 1_000 <= self.band_low <= self.band_high <= RATE / 2:
            raise ValueError("augment.band_low and .band_high are not in 1000 to 22050 Hz")

    def draw(self, rng: np.random.Generator, versions: tuple[str, ...] = ()) -> Chain:
        """A random chain: with one random codec, or with each codec of `versions`."""
        speed, eq, clip, band, noise, level, gain = rng.random(7)
        kinds = [str(kind) for kind in rng.choice(("low", "high", "peak"), self.eq_bands)]
        bands = [
            (kind, float(60 * 200 ** rng.random()), float(rng.uniform(-self.eq_db, self.eq_db)))
            for kind in kinds[: rng.integers(1, self.eq_bands + 1)]
        ]
        edges = np.cumsum([self.one_channel_p, self.random_mix_p, self.stereo_p])
        mix = int(np.searchsorted(edges, rng.random(), side="right"))  # 3: the mean
        left = (float(rng.integers(2)), float(rng.random()), 0.5, 0.5)[mix]
        change = rng.uniform(-self.speed, self.speed)
        span = self.band_high - self.band_low
        return Chain(
            speed=1 + float(change) if speed < self.speed_p else 1.0,
            eq=tuple(bands) if eq < self.eq_p else (),
            left=left,
            stereo=mix == 2,
            clip_db=float(rng.uniform(0, self.clip_db)) if clip < self.clip_p else 0.0,
            soft=bool(rng.integers(2)),
            cutoff=float(self.band_low + span * rng.random() ** 0.6) if band < self.band_p else 0.0,
            resampled=bool(rng.integers(2)),
            noise_db=_uniform(rng, self.noise_low, self.noise_high, noise < self.noise_p),
            noise_seed=int(rng.integers(2**32)),
            level_db=_uniform(rng, self.level_low, self.level_high, level < self.level_p),
            codecs=self.draw_codecs(rng, versions),
            gain_db=_uniform(rng, self.gain_low, 0.0, gain < self.gain_p) or 0.0,
        )

    def draw_codecs(
        self, rng: np.random.Generator, versions: tuple[str, ...] = ()
    ) -> tuple[tuple[str, int], ...]:
        """(codec, kbit/s) of each version, or of one random codec."""
        shares = np.array([getattr(self, codec) for codec in (*CODECS, "vorbis")])
        drawn = rng.choice((*CODECS, "vorbis"), p=shares / shares.sum())
        low, high = np.log(self.kbps_low), np.log(self.kbps_high)
        codecs = versions or (str(drawn),)
        return tuple((codec, round(float(np.exp(rng.uniform(low, high))))) for codec in codecs)


def _uniform(rng: np.random.Generator, low: float, high: float, wanted: bool) -> float | None:
    value = float(rng.uniform(low, high))
    return value if wanted else None
