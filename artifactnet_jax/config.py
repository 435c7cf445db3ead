"""Every figure of the detector, with its unit, in one place.

A `Config` is frozen and hashable: it is a static argument of jitted functions, the header of a
weights file and the answer to "where does that number come from". Presets are data (`Config.v94()`,
`Config.edge()`), not subclasses. Nothing here imports more than the standard library.

Sources, as named in the comments: "paper" is the ArtifactNet paper, "runner" the public benchmark
runner of the released v9.4 model, "raw-song graph" the later whole-song export. What no source
states is marked "inferred".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

N_CHANNELS = (
    7  # mel_res, mel_H, mel_P, delta, delta2, log ratio H/P, spectral flux (paper, Table I)
)


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """From audio to the seven channels (paper III-C; runner for what the paper leaves open)."""

    sample_rate: int = 44_100  # Hz
    segment_samples: int = 176_400  # 4.0 s
    n_fft: int = 2048  # samples; periodic Hann window of the same length
    hop: int = 512  # samples; frames are centred, edges reflected
    hpss_width: int = 31  # bins and frames; median length along frequency and along time
    hpss_eps: float = 0.0  # added to h^2 + p^2; the raw-song graph has 1e-10, v9.4 behaves as 0
    n_mels: int = 128  # bands, 0 Hz to Nyquist
    mel_scale: Literal["slaney", "htk"] = "slaney"  # inferred; a converted graph brings its own
    mel_norm: Literal["slaney", "none"] = "slaney"  # "slaney" gives every band unit area
    amin: float = 1e-10  # power floor before the logarithm
    top_db: float = 80.0  # dB kept below the maximum over residual, H and P together

    @property
    def segment_s(self) -> float:
        """Segment length in seconds."""
        return self.segment_samples / self.sample_rate

    @property
    def n_bins(self) -> int:
        """Frequency bins of the STFT (1025)."""
        return self.n_fft // 2 + 1

    @property
    def n_frames(self) -> int:
        """STFT frames of a segment (345)."""
        return self.segment_samples // self.hop + 1


@dataclasses.dataclass(frozen=True)
class UNet:
    """ArtifactUNet: magnitude [n_bins, n_frames] -> mask in [0, mask_max] (paper III-B).

    The layout of v94 is inferred: it is the one whose parameter count is the published
    3,603,937. With `patch` larger than (1, 1) a strided convolution turns each patch of the
    spectrogram into one position, and a sub-pixel head turns positions back into patches, so that
    no convolution runs at full resolution.
    """

    patch: tuple[int, int] = (1, 1)  # bins, frames
    stem: int = 1  # features of a patch position; the patch's own size keeps all of its content
    widths: tuple[int, ...] = (32, 64, 128)  # features of each encoder level
    bottleneck: int = 256  # features; one residual block, one gated residual block
    input_scale: Literal["magnitude", "log"] = "magnitude"
    log_floor: float = 1e-3  # magnitude floor of "log": natural log less the segment's mean
    mask_max: float = 0.5  # paper III-B

    @property
    def stride(self) -> tuple[int, int]:
        """Bins and frames that the input is padded to a multiple of."""
        down = 2 ** len(self.widths)
        return self.patch[0] * down, self.patch[1] * down


@dataclasses.dataclass(frozen=True)
class CNN:
    """Forensic CNN on the seven channels: exactly 423,553 parameters (runner; layout inferred)."""

    widths: tuple[int, ...] = (32, 64, 128, 256)  # the last one without pooling
    hidden: int = 128
    dropout: float = 0.3  # training only; inferred


@dataclasses.dataclass(frozen=True)
class Verdict:
    """From segment scores to a song's verdict (paper III-D, runner, raw-song graph)."""

    threshold: float = 0.5  # paper; AI when score >= threshold
    aggregate: Literal["median", "rms"] = "median"  # paper and runner; "rms" is the raw-song graph
    runner_segments: int = 7  # runner: evenly spaced starts
    first_s: float = 60.0  # raw-song graph: seconds read
    min_tail_s: float = 2.0  # raw-song graph: a shorter tail is dropped, a longer one zero-padded
    rms_eps: float = 1e-9  # raw-song graph: weights are rms / (sum + rms_eps)
    silence_peak: float = 10 ** (-90 / 20)  # full scale; a segment that never exceeds it is silent


@dataclasses.dataclass(frozen=True)
class Published:
    """What the authors report for the released model: figures to stand beside, never ours."""

    unet_parameters: int = 3_603_937
    cnn_parameters: int = 423_553
    f1: float = 0.9829  # unseen test partition, n = 2,263, threshold 0.5
    fpr: float = 0.0149
    auc: float = 0.997
    fpr5_threshold: float = 0.28
    cross_codec_delta: float = 0.16
    seconds_per_track: tuple[float, float] = (5.0, 10.0)  # 4-minute track, RTX 4090


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole detector."""

    preset: str
    front_end: FrontEnd = FrontEnd()
    unet: UNet = UNet()
    cnn: CNN = CNN()
    verdict: Verdict = Verdict()

    @classmethod
    def v94(cls) -> Config:
        """The published model's size: 4,027,490 parameters, 132 GFLOP per segment."""
        return cls(preset="v94")

    @classmethod
    def edge(cls) -> Config:
        """Same input, residual, bottleneck and mask on 8x8 patches: 4 GFLOP per segment."""
        return cls(preset="edge", unet=UNet(patch=(8, 8), stem=64, input_scale="log"))

    @classmethod
    def from_preset(cls, name: str) -> Config:
        """Config of a preset; ValueError for an unknown name."""
        if name not in ("v94", "edge"):
            raise ValueError(f"unknown preset {name!r}: use 'v94' or 'edge'")
        return cls.v94() if name == "v94" else cls.edge()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a weights file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Inverse of `to_dict`; ValueError naming an unknown or missing key."""
        parts = {"front_end": FrontEnd, "unet": UNet, "cnn": CNN, "verdict": Verdict}
        if set(data) != set(parts) | {"preset"}:
            raise ValueError(f"config has keys {sorted(data)}, not preset and {sorted(parts)}")
        values = {}
        for key, part in parts.items():
            names = {field.name for field in dataclasses.fields(part)}
            if set(data[key]) != names:
                wrong = sorted(set(data[key]) ^ names)
                raise ValueError(f"config section {key!r} has unknown or missing keys {wrong}")
            pairs = data[key].items()
            values[key] = part(**{k: tuple(v) if isinstance(v, list) else v for k, v in pairs})
        return cls(preset=str(data["preset"]), **values)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def flops(config: Config) -> dict[str, int]:
    """Floating-point operations of the convolutions and linear layers, per segment.

    A multiply-add counts as two; biases, norms and activations are left out, as is usual.
    Returns {"unet", "cnn", "total"}.
    """
    fe, unet, cnn = config.front_end, config.unet, config.cnn
    rows = -(-fe.n_bins // unet.stride[0]) * unet.stride[0] // unet.patch[0]
    cols = -(-fe.n_frames // unet.stride[1]) * unet.stride[1] // unet.patch[1]
    area = unet.patch[0] * unet.patch[1]

    def block(n: int, i: int, o: int) -> int:
        return 2 * n * (9 * i * o + 9 * o * o + (i * o if i != o else 0))

    n, i, total = rows * cols, 1, 0
    if area > 1:
        total, i = 2 * n * area * unet.stem, unet.stem
    total += 2 * n * unet.widths[0] * area  # head
    above = unet.bottleneck
    for o in unet.widths:
        total += block(n, i, o) + 2 * (n // 4) * 16 * o * o  # encoder block, 4x4 stride-2 down
        i, n = o, n // 4
    total += block(n, i, unet.bottleneck) + 2 * n * 19 * unet.bottleneck**2  # and the gated block
    for o in reversed(unet.widths):
        total += 2 * n * above * 4 * o + block(4 * n, 2 * o, o)  # 2x2 transposed up, decoder block
        above, n = o, 4 * n

    head, i, (height, width) = 0, N_CHANNELS, (fe.n_mels, fe.n_frames)
    for level, o in enumerate(cnn.widths):
        head += 2 * height * width * 9 * i * o
        i = o
        if level < len(cnn.widths) - 1:
            height, width = height // 2, width // 2
    head += 2 * (i * cnn.hidden + cnn.hidden)
    return {"unet": total, "cnn": head, "total": total + head}
