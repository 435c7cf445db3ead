"""Files whose headers and bytes disagree: all of the sound is read, or what is missing is said.

The oracle is what was written: the sound itself, its length, or a decoder's word on a whole file.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile

from artifactnet_jax.audio import AudioReport, SegmentReader
from artifactnet_jax.config import Decision, FrontEnd
from artifactnet_jax.decode import open_audio
from artifactnet_jax.recording import AudioError
from audio_files import encode, noise

RATE = 44_100


def sound(data: bytes) -> np.ndarray:
    """Every sample of a file, float32 [n, channels of the first block]."""
    with open_audio(io.BytesIO(data)) as decoded:
        return np.concatenate([block[:, :1] for block in decoded.blocks])[:, 0]


def report(data: bytes) -> AudioReport:
    reader = SegmentReader(io.BytesIO(data), FrontEnd(), Decision())
    for _ in reader:
        pass
    return reader.report


def told(data: bytes) -> set[str]:
    """Warnings, but for what the material is."""
    return set(report(data).warnings) - {"short", "band-limited", "resampled"}


def failure(data: bytes) -> AudioError:
    with pytest.raises(AudioError) as caught:
        report(data)
    return caught.value


def left(pcm: np.ndarray) -> np.ndarray:
    return pcm[:, 0] / np.float32(32768)


def id3(size: int) -> bytes:
    parts = [(size >> shift) & 127 for shift in (21, 14, 7, 0)]
    return b"ID3\x03\0\0" + bytes(parts) + bytes(size)


FIRST, SECOND = noise(2, channels=1), noise(3, channels=1, seed=1)


# --- MPEG audio -----------------------------------------------------------------------------------


def untagged(data: bytes) -> bytes:
    """An MP3 without the frame that holds its encoder's tag."""
    at = max(data.find(b"Info"), data.find(b"Xing")) - 36
    at = at if data[at] == 255 else at + 15  # mono
    kbits = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[(data[at + 2] >> 4) - 1]
    return data[at + 144 * kbits * 1000 // RATE + (data[at + 2] >> 1 & 1) :]


def with_count(data: bytes, frames: int) -> bytes:
    at = max(data.find(b"Info"), data.find(b"Xing"))
    return data[: at + 8] + struct.pack(">I", frames) + data[at + 12 :]


MP3, OTHER = (encode(pcm, "mp3") for pcm in (FIRST, SECOND))


def test_joined_mp3s_are_read_to_the_end():
    whole = np.concatenate([sound(MP3), sound(OTHER)])
    assert np.array_equal(sound(MP3 + OTHER), whole)
    assert np.array_equal(sound(MP3 + id3(5000) + OTHER), whole)
    assert report(MP3 + OTHER).warnings == ()


@pytest.mark.parametrize("frames", [0, 20])
def test_a_tag_with_too_few_frames_is_not_the_end(frames):
    assert np.array_equal(sound(with_count(OTHER, frames)), sound(OTHER))


def test_a_tag_with_too_many_frames_is_a_cut():
    assert told(with_count(OTHER, 1000)) == {"truncated"}


LYRICS = b"LYRICSBEGININD0000300LYR00011la la la \r\n000037LYRICS200"
BEHIND = [bytes(20_000), LYRICS + b"TAG" + bytes(125), b"<html>" + b"<p>503</p>" * 900]
BEHIND += [b"\xff\xd8\xff\xe0" + noise(0.1).tobytes(), id3(3000), b"APETAGEX" + bytes(24)]


@pytest.mark.parametrize("behind", BEHIND, ids=["zeros", "lyrics", "html", "jpeg", "id3", "ape"])
def test_what_stands_behind_an_mp3_is_not_read(behind):
    for data in (MP3, untagged(MP3)):
        assert np.array_equal(sound(data + behind), sound(data))
        assert "damaged" not in report(data + behind).warnings


@pytest.mark.parametrize("hole", [bytes(2000), noise(0.02).tobytes()[:2000], b""])
def test_a_hole_in_an_mp3_is_counted(hole):
    middle = len(OTHER) // 2
    found = report(OTHER[:middle] + hole + OTHER[middle + 2000 :])
    assert set(found.warnings) - {"short"} == {"damaged"}
    assert found.lost_s == pytest.approx(3 * 2000 / len(OTHER), abs=0.08)
    assert found.duration_s + found.lost_s == pytest.approx(3, abs=0.08)


def test_an_mp3_copied_as_text_is_damaged():
    assert failure(OTHER.replace(b"\n", b"\r\n")).kind == "decode"
    assert failure(untagged(OTHER).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")).kind == "decode"


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 2), (22_050, 1)])
def test_an_mp3_that_changes_midway_is_read_whole(rate, channels):
    more = encode(noise(3, rate, channels, seed=2), "lame.mp3", rate)
    for first, second in ((MP3, more), (untagged(MP3), more)):
        assert report(first + second).duration_s == pytest.approx(5, abs=0.1)


def test_untagged_vbr_is_read_whole():
    av = pytest.importorskip("av")
    out = io.BytesIO()
    quiet_then_loud = np.concatenate([FIRST // 1000, SECOND])
    with av.open(out, "w", format="mp3", options={"write_xing": "0"}) as container:
        stream: Any = container.add_stream("libmp3lame", rate=RATE, options={"q": "2"})
        stream.layout, stream.codec_context.qscale = "mono", True
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(quiet_then_loud.T), "s16p", "mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert report(out.getvalue()).duration_s == pytest.approx(5, abs=0.1)


def test_a_hole_in_adts_is_counted():
    data = encode(noise(4), "aac")
    start, end = len(data) // 3, len(data) // 3 + 4000
    found = report(data[:start] + bytes(4000) + data[end:])
    assert set(found.warnings) - {"short"} == {"damaged"}
    assert found.lost_s + found.duration_s == pytest.approx(4, abs=0.15)


# --- FLAC and Ogg ---------------------------------------------------------------------------------


def with_total(flac: bytes, total: int) -> bytes:
    at = flac.find(b"fLaC") + 8 + 13
    return flac[:at] + bytes([flac[at] & 0xF0]) + struct.pack(">I", total) + flac[at + 5 :]


def test_flac_goes_on_behind_its_total():
    data = encode(SECOND, "flac")
    assert np.array_equal(sound(with_total(data, RATE)), left(SECOND))
    assert np.array_equal(sound(with_total(data, 0)), left(SECOND))


@pytest.mark.parametrize("second", [SECOND, FIRST, FIRST[:999]])
def test_joined_flac_is_read_to_the_end(second):
    joined = encode(FIRST, "flac") + encode(second, "flac")
    assert np.array_equal(sound(joined), np.concatenate([left(FIRST), left(second)]))


@pytest.mark.parametrize("kind", ["ogg", "opus", "oga"])
def test_chained_ogg_is_read_to_the_end(kind):
    rate = 48_000 if kind == "opus" else RATE
    parts = [_ogg(noise(seconds, rate, 1, seed=5), kind, rate) for seconds in (2, 3)]
    whole = np.concatenate([sound(part) for part in parts])
    assert len(whole) == 5 * rate
    assert np.array_equal(sound(b"".join(parts)), whole)


def _ogg(pcm: np.ndarray, kind: str, rate: int = RATE) -> bytes:
    if kind != "oga":
        return encode(pcm, kind, rate)
    return muxed("ogg", "flac", pcm)


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_damaged_pages_are_counted(kind):
    rate = 48_000 if kind == "opus" else RATE
    data = bytearray(encode(noise(9, rate), kind, rate))
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    found = report(bytes(data))
    assert "damaged" in found.warnings
    assert "truncated" not in found.warnings
    assert found.lost_s + found.duration_s == pytest.approx(9, abs=0.2)


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_a_cut_ogg_is_told(kind):
    rate = 48_000 if kind == "opus" else RATE
    data = encode(noise(9, rate), kind, rate)
    assert "truncated" in report(data[: len(data) // 2]).warnings


def test_a_cut_ogg_flac_is_an_error():
    data = _ogg(SECOND, "oga")
    assert failure(data[: len(data) * 6 // 10]).kind == "truncated"


# --- Chunks ---------------------------------------------------------------------------------------


def wav(
    pcm: np.ndarray, riff: int | None = None, data: int | None = None, tail: bytes = b""
) -> bytes:
    """A WAV file of int16 [n, channels], with other sizes than it has."""
    body = pcm.astype("<i2").tobytes()
    channels = pcm.shape[1]
    fmt = struct.pack("<HHIIHH", 1, channels, RATE, RATE * 2 * channels, 2 * channels, 16)
    size = 36 + len(body) + len(tail)
    head = b"RIFF" + struct.pack("<I", size if riff is None else riff) + b"WAVEfmt \x10\0\0\0" + fmt
    return head + b"data" + struct.pack("<I", len(body) if data is None else data) + body + tail


@pytest.mark.parametrize("size", [0, 1000, 2**31 - 1, 2**32 - 1, 0x7FFFF000])
def test_wav_is_read_whole_whatever_its_size_says(size):
    assert np.array_equal(sound(wav(SECOND, data=size)), left(SECOND))
    assert np.array_equal(sound(wav(SECOND, riff=size, data=size)), left(SECOND))
    assert np.array_equal(sound(id3(70_000) + wav(SECOND, data=size)), left(SECOND))
    assert "truncated" not in report(wav(SECOND, data=size)).warnings


TAILS = {
    "list": b"LIST" + struct.pack("<I", 4) + b"INFO",
    "id3": id3(40_000),
    "zeros": bytes(100_000),
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 400,
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_what_stands_behind_wav_is_not_read(tail):
    assert np.array_equal(sound(wav(SECOND, tail=tail)), left(SECOND))


def test_joined_wav_is_read_to_the_end():
    assert np.array_equal(
        sound(wav(FIRST) + wav(SECOND)), np.concatenate([left(FIRST), left(SECOND)])
    )


@pytest.mark.parametrize("size", [0, 2**64 - 1, 5000])
def test_rf64_is_read_whole_whatever_its_size_says(size):
    head, body = wav(SECOND)[12:36], SECOND.astype("<i2").tobytes()
    sizes = struct.pack("<QQQI", size, size, size, 0)
    data = b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<I", 28) + sizes + head
    assert np.array_equal(sound(data + b"data\xff\xff\xff\xff" + body), left(SECOND))


def w64(pcm: np.ndarray, size: int | None = None) -> bytes:
    tail = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
    riff = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
    body = pcm.astype("<i2").tobytes()
    fmt = wav(pcm)[20:36]
    parts = riff + struct.pack("<Q", 40 + 40 + 24 + len(body)) + b"wave" + tail
    parts += b"fmt " + tail + struct.pack("<Q", 40) + fmt
    return parts + b"data" + tail + struct.pack("<Q", size or 24 + len(body)) + body


@pytest.mark.parametrize("size", [24, 4024, 2**63 - 1])
def test_w64_is_read_whole_whatever_its_size_says(size):
    assert np.array_equal(sound(w64(SECOND)), left(SECOND))
    assert np.array_equal(sound(w64(SECOND, size)), left(SECOND))


@pytest.mark.parametrize("size", [0, 0x7F000000, 2**31 - 1, 2**32 - 1, 4000])
def test_aiff_is_read_whole_whatever_its_sizes_say(size):
    data = bytearray(encode(SECOND, "aiff"))
    data[4:8] = struct.pack(">I", size)
    at = data.find(b"SSND")
    data[at + 4 : at + 8] = struct.pack(">I", size)
    at = data.find(b"COMM")
    data[at + 10 : at + 14] = struct.pack(">I", size // 2)
    assert np.array_equal(sound(bytes(data)), left(SECOND))


def container(pcm: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, pcm, RATE, "PCM_16", format=kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "AU", "W64", "RF64", "WAVEX", "FLAC"])
def test_a_cut_lossless_file_is_an_error_in_every_container(kind):
    data = container(SECOND, kind)
    assert np.array_equal(sound(data), left(SECOND))
    error = failure(data[: len(data) * 6 // 10])
    assert error.kind == "truncated"


def test_caf_of_unknown_size_is_read_whole():
    data = container(SECOND, "CAF")
    at = data.find(b"data") + 4
    for size in (-1, 4, 5004):
        assert np.array_equal(
            sound(data[:at] + struct.pack(">q", size) + data[at + 8 :]), left(SECOND)
        )


def test_voc():
    body = SECOND.astype("<i2").tobytes()
    size = (12 + len(body)).to_bytes(3, "little")
    head = b"Creative Voice File\x1a\x1a\x00\x0a\x01\x29\x11\x09" + size
    data = head + struct.pack("<IBBHI", RATE, 16, 1, 4, 0) + body + b"\0"
    assert np.array_equal(sound(data), left(SECOND))
    assert np.array_equal(sound(data + bytes(50_000)), left(SECOND))
    assert failure(data[: len(data) * 6 // 10]).kind == "truncated"


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "AU"])
def test_pcm_copied_as_text_is_damaged(kind):
    data = container(SECOND, kind)
    at = len(data) - 2 * len(SECOND)
    lines = data[:at] + data[at:].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert failure(lines).kind == "decode"
    assert failure(data[:at] + data[at:].decode("latin-1").encode()).kind == "decode"
    assert failure(data[:at] + data[at:].decode(errors="replace").encode()).kind == "decode"


# --- What FFmpeg reads ----------------------------------------------------------------------------


def muxed(form: str, codec: str, pcm: np.ndarray, options: Any = None, **tracks: Any) -> bytes:
    """int16 [n, channels] in a container."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    layout = "mono" if pcm.shape[1] == 1 else "stereo"
    with av.open(out, "w", format=form, container_options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.layout, stream.bit_rate = layout, 128_000
        resampler = av.AudioResampler(stream.codec_context.format, layout, RATE)
        for start in range(0, len(pcm), 4096):
            packed = np.ascontiguousarray(pcm[start : start + 4096]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
            frame.sample_rate, frame.pts = RATE, start
            for converted in resampler.resample(frame):
                container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize(
    ("form", "codec"), [("matroska", "flac"), ("tta", "tta"), ("ipod", "alac"), ("wv", "wavpack")]
)
def test_a_cut_lossless_file_is_an_error_to_ffmpeg_too(form, codec):
    data = muxed(form, codec, noise(4))
    assert report(data).warnings == ()
    assert failure(data[: len(data) * 6 // 10]).kind in ("truncated", "decode")


@pytest.mark.parametrize(("form", "codec"), [("matroska", "aac"), ("asf", "wmav2")])
def test_a_cut_lossy_file_is_a_warning(form, codec):
    data = muxed(form, codec, noise(4))
    found = report(data[: len(data) * 6 // 10])
    assert "truncated" in found.warnings


def clusters_cut(data: bytes) -> bytes:
    """A Matroska file without some clusters of its middle."""
    parts = data.split(b"\x1f\x43\xb6\x75")
    assert len(parts) > 8
    return b"\x1f\x43\xb6\x75".join(parts[:3] + parts[6:])


def test_a_hole_in_matroska_is_counted():
    options = {"cluster_time_limit": "300"}
    lossless = clusters_cut(muxed("matroska", "flac", noise(6), options))
    assert failure(lossless).kind == "decode"
    found = report(clusters_cut(muxed("matroska", "aac", noise(6), options)))
    assert "damaged" in found.warnings
    assert found.lost_s + found.duration_s == pytest.approx(6, abs=0.2)


def test_a_damaged_packet_of_m4a_is_counted():
    data = bytearray(muxed("ipod", "aac", noise(4)))
    at = data.find(b"mdat") + 20_000
    data[at : at + 300] = bytes((7 * k + 3) & 255 for k in range(300))
    found = report(bytes(data))
    assert "damaged" in found.warnings
    assert 0 < found.lost_s < 0.3


@pytest.mark.parametrize(("form", "codec"), [("avi", "libmp3lame"), ("flv", "libmp3lame")])
def test_other_containers_tell_a_cut(form, codec):
    data = muxed(form, codec, noise(4))
    assert told(data) == set()
    assert "truncated" in told(data[: len(data) * 6 // 10])


@pytest.mark.parametrize(("form", "codec"), [("ac3", "ac3"), ("mpegts", "aac"), ("asf", "wmav2")])
def test_zeros_behind_packets_are_no_damage(form, codec):
    data = muxed(form, codec, noise(2))
    assert told(data + bytes(50_000)) == told(data) == set()


def test_a_hole_between_bare_packets_is_counted():
    data = muxed("ac3", "ac3", noise(4))
    middle = len(data) // 2
    assert told(data[:middle] + data[middle + 3000 :]) == {"damaged"}


def test_a_hole_in_fragments_is_told():
    options = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}
    data = muxed("mp4", "aac", noise(4), options)
    assert told(data) == set()
    middle = len(data) // 2
    assert "truncated" in told(data[:middle] + data[middle + 3000 :])


def test_no_moov_and_encryption_are_told():
    data = muxed("ipod", "aac", noise(2))
    broken = failure(data[: data.find(b"moov") - 4])
    assert (broken.kind, "moov" in str(broken)) == ("truncated", True)
    key = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "0" * 32,
        "encryption_kid": "1" * 32,
    }
    assert failure(muxed("mp4", "aac", noise(2), key)).kind == "encrypted"


def two_tracks(form: str, default: int | None, seconds: tuple[float, float] = (2, 2)) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        streams: list[Any] = [container.add_stream("aac", rate=RATE) for _ in range(2)]
        for k, stream in enumerate(streams):
            stream.layout = "mono"
            stream.disposition = av.stream.Disposition.default if k == default else 0
        for k, stream in enumerate(streams):
            pcm = np.zeros((1, round(seconds[k] * RATE)), np.float32)
            pcm[:] = np.sin(np.arange(pcm.size) * 0.02 * (k + 1)) / 2
            frame = av.AudioFrame.from_ndarray(pcm, "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("form", ["ipod", "matroska"])
def test_the_default_track_is_read_and_told(form):
    for default in (0, 1):
        data = two_tracks(form, default)
        assert report(data).track == f"{default + 1} of 2"
        spectrum = np.abs(np.fft.rfft(sound(data)[RATE // 2 : RATE // 2 + RATE]))
        assert np.argmax(spectrum) == pytest.approx(RATE * 0.02 * (default + 1) / 6.2832, abs=2)
    assert report(encode(noise(1), "m4a")).track is None


def test_without_a_default_the_fullest_track_is_read():
    assert report(two_tracks("matroska", None, (1, 3))).track == "2 of 2"


# --- What is no sound, and what cancels -----------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [(0xF872, 0x4E1F), (0x72F8, 0x1F4E), (0x7FFE, 0x8001), (0xFE7F, 0x0180), (0x1FFF, 0xE800)],
)
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF"])
def test_packed_streams_are_refused(words, kind):
    pcm = noise(4).astype(np.int16)
    pcm[:RATE] = 0
    pcm.view(np.uint16)[RATE::1536] = words
    assert failure(container(pcm, kind)).kind == "unsupported"
    with pytest.raises(AudioError, match="packed"):
        list(SegmentReader((pcm, RATE), FrontEnd(), Decision()))


def segments(pcm: np.ndarray, rate: int = RATE) -> tuple[np.ndarray, tuple[str, ...]]:
    reader = SegmentReader((pcm, rate), FrontEnd(), Decision())
    return np.concatenate([segment.samples for segment in reader]), reader.report.warnings


@pytest.mark.parametrize("rate", [RATE, 48_000])
@pytest.mark.parametrize("balance", [-1.0, -0.95, -1.05])
def test_channels_that_cancel_are_not_added(balance, rate):
    x = noise(8, rate, 1)[:, 0] / np.float32(32768)
    heard, warnings = segments(np.stack([x, np.float32(balance) * x], 1), rate)
    assert "phase" in warnings
    alone, _ = segments(x[:, None], rate)
    assert np.allclose(heard, alone * (1 - balance) / 2, atol=1e-6)


@pytest.mark.parametrize("balance", [-0.5, 0.0, 1.0])
def test_other_stereo_is_mixed_as_ever(balance):
    x = noise(8, channels=1)[:, 0] / np.float32(32768)
    heard, warnings = segments(np.stack([x, np.float32(balance) * x], 1))
    assert warnings == ()
    assert np.allclose(heard, x * (1 + balance) / 2, atol=1e-6)
