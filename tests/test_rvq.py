"""Self-synthesis: the family of codecs, quantiser, training, re-synthesis and the verb `rvq`."""

from __future__ import annotations

import contextlib
import csv
import errno
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import soundfile
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from artifactnet_jax.data.manifest import Row, read_manifest
from artifactnet_jax.data.splits import check_rows
from artifactnet_jax.text import CommandError
from artifactnet_jax.train import autoencoder, losses, rvq, rvq_model
from artifactnet_jax.train.autoencoder import Codebooks, Codec
from artifactnet_jax.train.rvq_model import Model, Track
from audio_files import write

SMALL = Codec((8, 4), (8, 12), latent=6, codes=16, depth=3, kernel=3, dilations=(1, 2))
TINY = Codec((16,), (12,), latent=6, codes=16, depth=3, kernel=5, dilations=(1,))
ROW = Row("a.wav", 0, "real", "site", "", "site/a.wav", "train")


def tones(n: int, seed: int = 0) -> np.ndarray:
    """int16 [n, 1]: three tones that come and go, and a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 44_100
    f, slow = rng.uniform(200, 3000, 3), rng.uniform(1, 5, 3)
    waves = np.sin(2 * np.pi * np.outer(t, f)) * np.sin(2 * np.pi * np.outer(t, slow))
    return (4000 * waves.sum(1) + 20 * rng.standard_normal(n)).astype(np.int16)[:, None]


def track(n: int, seed: int = 0) -> Track:
    audio = tones(n, seed)
    return Track(ROW, audio, 0.1 / float(np.sqrt(np.mean((audio / 32768) ** 2))))


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that a test has time for."""
    sizes: dict[str, Any] = {"BATCH": 2, "CROP": 4096, "CHUNK": 2**14, "MEASURED_CROP": 2**13}
    sizes |= {"VECTORS_PER_CODE": 1, "UNQUANTISED": 0.0}
    for name, value in sizes.items():
        monkeypatch.setattr(rvq_model, name, value)
    sizes = {"LLOYD": 2, "KBPS": (1.0, 500.0), "LAYOUTS": (((16,), (8,)), ((32,), (12,)))}
    for name, value in sizes.items():
        monkeypatch.setattr(autoencoder, name, value)
    monkeypatch.setattr(losses, "RESOLUTIONS", (512,))


def random_model(codec: Codec, seed: int = 0) -> Model:
    """Random tensors whose codes and audio are not trivial."""
    rng = np.random.default_rng(seed)
    tensors = {
        rvq_model._name(path): rng.normal(0, 0.2, leaf.shape).astype(np.float32)
        for path, leaf in nnx.to_flat_state(rvq_model._split(codec)[1])
    }
    shape = (codec.depth, codec.codes, codec.latent)
    tensors["codebooks"] = rng.normal(0, 0.5, shape).astype(np.float32)
    return Model(codec, tensors, {"steps": 0, "seconds": 0})


@pytest.fixture(scope="module")
def untrained() -> Model:
    return random_model(SMALL)


# --- the family ------------------------------------------------------------------------------


def test_codecs_differ_and_fewer_are_the_beginning_of_more(monkeypatch):
    monkeypatch.undo()  # the real layouts
    found = autoencoder.codecs(24, seed=3)
    assert len({codec.name for codec in found}) == 24
    assert autoencoder.codecs(5, seed=3) == found[:5] != autoencoder.codecs(5, seed=4)
    assert {codec.decoder for codec in found[:3]} == {"transposed", "nearest", "linear"}
    assert {codec.activation for codec in found[:4]} == {"snake", "elu"}
    assert len({codec.hop for codec in found}) >= 4
    assert all(autoencoder.KBPS[0] <= codec.kbps <= autoencoder.KBPS[1] for codec in found)
    assert all(rvq_model.CHUNK % codec.hop == rvq_model.CROP % codec.hop == 0 for codec in found)


def test_figures_of_a_codec():
    codec = Codec((16, 8), (64, 256), codes=512, depth=8)
    assert codec.hop == 128
    assert codec.kbps == pytest.approx(44.1 / 128 * 8 * 9)
    assert Codec.from_dict(json.loads(json.dumps(codec.__dict__))) == codec


# --- the network -----------------------------------------------------------------------------


def interpolated(x: np.ndarray, stride: int, kind: str) -> np.ndarray:
    """x at `stride` times its rate, as each decoder is said to do it."""
    if kind == "nearest":
        return np.repeat(x, stride)
    if kind == "linear":
        places = np.arange(-stride + 1, len(x) * stride) / stride
        return np.interp(places, np.arange(-1, len(x) + 1), np.pad(x, 1))
    stuffed = np.zeros((len(x) - 1) * stride + 1)
    stuffed[::stride] = x
    return stuffed


@pytest.mark.parametrize("kind", ["transposed", "nearest", "linear"])
@pytest.mark.parametrize(("stride", "overlap"), [(2, 2), (4, 4), (3, 1)])
def test_upsampling_is_interpolation_then_convolution(kind, stride, overlap):
    layer = autoencoder.Upsample(2, 3, stride, overlap, kind, autoencoder.Random(0))
    kernel = np.asarray(layer.kernel[...], np.float64)
    layer.bias[...] = jnp.array([0.5, 0.0, -1.0])
    x = np.random.default_rng(1).standard_normal((2, 7, 2))
    found = np.asarray(jax.jit(lambda x: layer(x))(x.astype(np.float32)))
    assert found.shape == (2, 7 * stride, 3)
    for b, o in itertools.product(range(2), range(3)):
        whole = np.sum(
            [np.convolve(interpolated(x[b, :, i], stride, kind), kernel[:, i, o]) for i in (0, 1)],
            axis=0,
        )
        first = (len(whole) - 7 * stride) // 2  # as much of the response before as after
        expected = whole[first : first + 7 * stride] + [0.5, 0.0, -1.0][o]
        assert_allclose(found[b, :, o], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "activation"), [("transposed", "snake"), ("nearest", "elu"), ("linear", "snake")]
)
def test_shapes_and_level_at_the_start(decoder, activation):
    codec = Codec((4, 2, 2), (8, 12, 16), 5, 16, 2, decoder, activation, dilations=(1,))

    net = autoencoder.Autoencoder(codec)

    @jax.jit
    def both(audio):
        latent = net.encode(audio)
        return latent, net.decode(latent)

    audio = jnp.asarray(np.random.default_rng(0).standard_normal((2, 512)), jnp.float32)
    latent, made = both(audio)
    assert latent.shape == (2, 32, 5)
    assert made.shape == audio.shape
    assert made.dtype == jnp.float32
    assert 0.05 < float(jnp.std(made)) < 20


def test_deemphasis_undoes_emphasis():
    audio = np.random.default_rng(0).standard_normal((2, 700)).astype(np.float32)
    bright = jax.jit(autoencoder.emphasise)(audio)
    a = autoencoder.EMPHASIS
    assert_allclose(bright, scipy.signal.lfilter([1, -a], [1], audio), atol=1e-6)
    assert_allclose(jax.jit(autoencoder.deemphasise)(bright), audio, atol=1e-5)


def test_context_bounds_what_a_sample_reaches(untrained):
    n, middle = 4096, 2048
    context = SMALL.context
    tensors = {k: jnp.asarray(v) for k, v in untrained.tensors.items() if k != "codebooks"}

    @jax.jit
    def make(audio):
        net = rvq_model._network(SMALL, tensors)
        return net.decode(net.encode(audio))

    audio = np.random.default_rng(0).normal(0, 0.1, (1, n)).astype(np.float32)
    moved = audio.copy()
    moved[0, middle] += 1
    made = [np.asarray(make(x))[0] for x in (audio, moved)]
    touched = np.flatnonzero(made[0] != made[1])
    assert middle - context <= touched[0]
    assert touched[-1] <= middle + context
    assert touched[-1] - touched[0] > context / 2  # the bound is no wild guess
    assert context % SMALL.hop == 0


# --- the quantiser ---------------------------------------------------------------------------


def brute_force(vectors: np.ndarray, books: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and what each codebook was given, one vector at a time, in float64."""
    codes, given = np.zeros((len(books), len(vectors)), int), []
    rest = vectors.astype(np.float64).copy()
    for level, book in enumerate(books.astype(np.float64)):
        given.append(rest.copy())
        for k in range(len(rest)):
            codes[level, k] = np.argmin([np.sum((rest[k] - code) ** 2) for code in book])
            rest[k] -= book[codes[level, k]]
    return codes, np.array(given)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((40, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def books() -> np.ndarray:
    scales = np.array([1, 0.5, 0.25])[:, None, None]
    return (scales * np.random.default_rng(6).standard_normal((3, 16, 6))).astype(np.float32)


def test_quantiser_is_brute_force(vectors, books):
    codes, given = jax.jit(autoencoder.quantise)(jnp.asarray(vectors), jnp.asarray(books))
    expected, rests = brute_force(vectors, books)
    assert_array_equal(codes, expected)
    assert_allclose(given, rests, atol=1e-5)
    made = autoencoder.dequantise(codes, jnp.asarray(books))
    summed = sum(books[level][expected[level]].astype(np.float64) for level in range(3))
    assert_allclose(made, summed, atol=1e-5)


def test_straight_through_and_commitment(vectors, books):
    weight = np.random.default_rng(7).standard_normal((2, 20, 6)).astype(np.float32)
    latent = jnp.asarray(vectors.reshape(2, 20, 6))
    codes, rests = brute_force(vectors, books)

    def passed(latent, books):
        return jnp.sum(autoencoder.straight_through(latent, books)[0] * weight)

    def commitment(latent, books):
        return autoencoder.straight_through(latent, books)[1]

    value, loss, *_ = jax.jit(autoencoder.straight_through)(latent, jnp.asarray(books))
    summed = sum(books[level][codes[level]] for level in range(3))
    assert_allclose(value, summed.reshape(2, 20, 6), atol=1e-5)
    to_latent, to_books = jax.jit(jax.grad(passed, (0, 1)))(latent, jnp.asarray(books))
    assert_array_equal(to_latent, weight)
    assert not np.any(to_books)
    left = np.concatenate([rests[1:], (vectors - summed)[None]])
    assert float(loss) == pytest.approx(
        np.sum(np.mean(left**2, axis=(1, 2))) / np.mean(vectors**2), rel=1e-5
    )
    to_latent, to_books = jax.jit(jax.grad(commitment, (0, 1)))(latent, jnp.asarray(books))
    expected = 2 * left.sum(axis=0) / vectors.size / np.mean(vectors**2)
    assert_allclose(to_latent.reshape(40, 6), expected, atol=1e-6)
    assert not np.any(to_books)


def test_codebooks_are_moving_averages_and_no_code_stays_dead():
    even = 4 / 3  # vectors per code
    start = jnp.array([[[0.0], [10.0], [99.0]]])
    usage = jnp.array([[even, even, 1.001 * autoencoder.DEAD * even]])
    before = Codebooks(start, usage, start * usage[..., None])
    inputs = jnp.array([[[1.0], [2.0], [3.0], [11.0]]])
    codes = jnp.array([[0, 0, 0, 1]])
    after = jax.jit(autoencoder.moved)(before, codes, inputs, jax.random.key(0))
    d = autoencoder.CODE_DECAY
    first = (d * even * 0 + (1 - d) * 6) / (d * even + (1 - d) * 3)
    second = (d * even * 10 + (1 - d) * 11) / (d * even + (1 - d))
    assert_allclose(after.vectors[0, :2, 0], [first, second], rtol=1e-6)
    assert float(after.vectors[0, 2, 0]) in (1.0, 2.0, 3.0, 11.0)
    assert_allclose(after.usage[0], [d * even + (1 - d) * 3, d * even + (1 - d), even], rtol=1e-6)
    assert_allclose(after.total, after.vectors * after.usage[..., None], rtol=1e-6)


def test_first_codebooks():
    # As many vectors as codes: each becomes one, and nothing is left for the second level.
    vectors = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    found = autoencoder.first_codebooks(jnp.asarray(vectors), jax.random.key(0), 2, 16, 32)
    order = np.lexsort(vectors.T)
    assert_allclose(
        np.asarray(found.vectors[0])[np.lexsort(np.asarray(found.vectors[0]).T)], vectors[order]
    )
    assert not np.any(found.vectors[1])
    assert_array_equal(found.usage, np.full((2, 16), 2.0))
    # Many vectors in two far groups: the means of the groups, then what is left about 0.
    groups = np.concatenate([vectors[:8] * 0.01 - 5, vectors[8:] * 0.01 + 5])
    found = autoencoder.first_codebooks(jnp.asarray(groups), jax.random.key(1), 1, 2, 16)
    means = np.stack([groups[:8].mean(0), groups[8:].mean(0)])
    got = np.asarray(found.vectors[0])
    spread = np.ptp(got[:, 0])
    assert spread < 1 or np.allclose(got[np.argsort(got[:, 0])], means, atol=1e-5)
    assert spread > 1  # this key draws one of each


def test_codes_are_all_that_the_decoder_needs(untrained):
    audio = np.random.default_rng(0).normal(0, 0.1, (2, 512)).astype(np.float32)
    made, codes = untrained.apply(audio)
    assert codes.shape == (3, 2 * 512 // 32)
    assert codes.dtype == jnp.int32
    tensors = {k: jnp.asarray(v) for k, v in untrained.tensors.items()}
    books = tensors.pop("codebooks")
    latent = autoencoder.dequantise(codes, books).reshape(2, -1, 6)
    decoded = jax.jit(lambda latent: rvq_model._network(SMALL, tensors).decode(latent))(latent)
    assert_allclose(decoded, made, atol=1e-5)


# --- training --------------------------------------------------------------------------------


def test_training_learns_a_clip_and_repeats(monkeypatch):
    clip = track(20_000)
    said: list[int] = []
    monkeypatch.setattr(rvq_model, "UNQUANTISED", 0.3)
    monkeypatch.setattr(rvq_model, "RATE_OF_LEARNING", 4e-3)
    model = rvq_model.train(TINY, [clip], 200, 0, said.append)
    figures = rvq_model.measure(model, [clip])
    assert figures["si_sdr"] > 4  # at the start about -40
    assert 0 < figures["used"] <= 1
    again = rvq_model.train(TINY, [clip], 200, 0)
    assert all(np.array_equal(again.tensors[name], t) for name, t in model.tensors.items())
    assert said == [*range(20, 201, 20)]


def test_crops_have_the_level_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(rvq_model, "BATCH", 64)
    batch = rvq_model.crops([track(4096), track(9000, 1)], np.random.default_rng(0))
    rms = 20 * np.log10(np.sqrt(np.mean(batch**2, axis=1)) / rvq_model.LEVEL)
    whole = rms[np.abs(batch[:, -1]) > 0]
    assert batch.shape == (64, 4096)
    assert -12 < whole.min() < -2  # the short track is at +-6 dB, the other one comes and goes
    assert 2 < whole.max() < 12


def test_compare_is_what_it_says():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 0.1, (4, 30_000))
    half = rvq_model.distances(0.5 * real, real)
    down = 20 * np.log10(0.5)
    assert half["si_sdr"] > 100
    assert (half["lsd"], half["mel"]) == (pytest.approx(-down, 1e-3), pytest.approx(-down, 1e-3))
    assert half["high"] == pytest.approx(down, 1e-6)
    noisy = rvq_model.distances(real + rng.normal(0, 0.01, real.shape), real)
    assert noisy["si_sdr"] == pytest.approx(20, abs=0.3)
    silent = rvq_model.distances(real[:1], np.zeros((1, 30_000)))
    assert all(np.isnan(value) for value in silent.values())


# --- re-synthesis ----------------------------------------------------------------------------


def test_chunks_are_the_whole(untrained):
    one = track(20_003)
    whole = list(rvq_model.resynthesise(untrained, one, chunk=32 * 700))
    assert len(whole) == 1
    assert whole[0].shape == (20_003,)
    for chunk in (32, 32 * 63):
        some = one if chunk > 32 else Track(ROW, one.audio[:500], one.gain)
        expected = (
            whole[0] if chunk > 32 else next(rvq_model.resynthesise(untrained, some, 32 * 700))
        )
        pieces = list(rvq_model.resynthesise(untrained, some, chunk))
        assert {len(piece) for piece in pieces[:-1]} == {chunk}
        assert_allclose(np.concatenate(pieces), expected, atol=1e-5 * np.abs(expected).max())


def test_a_positive_has_the_length_and_level_of_its_original(untrained, tmp_path):
    stereo = np.repeat(tones(20_001), 2, axis=1)
    stereo[:, 1] //= 2
    mono = stereo.mean(1) / 32768
    one = Track(ROW, stereo, 0.1 / float(np.sqrt(np.mean(mono**2))))
    rvq_model.write_positive(untrained, one, str(tmp_path / "a.flac"))
    info = soundfile.info(tmp_path / "a.flac")
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 1, "PCM_16")
    made, _ = soundfile.read(tmp_path / "a.flac")
    assert len(made) == 20_001
    assert np.sqrt(np.mean(made**2)) == pytest.approx(np.sqrt(np.mean(mono**2)), rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.flac"]


@pytest.mark.parametrize("allowed", [0, 100, 3000])
def test_a_full_disk_ends_it_and_leaves_nothing(untrained, tmp_path, monkeypatch, allowed):
    real = rvq_model.whole_file

    class Full:
        def __init__(self, file):
            self.file, self.seek, self.tell, self.read = file, file.seek, file.tell, file.read

        def write(self, data):
            if self.file.tell() + len(data) > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    @contextlib.contextmanager
    def saved(path: str) -> Iterator[Any]:
        with real(path) as file:
            yield Full(file)

    monkeypatch.setattr(rvq_model, "whole_file", saved)
    with pytest.raises(CommandError, match=r"a\.flac: .*No space left on device.*free space"):
        rvq_model.write_positive(untrained, track(20_000), str(tmp_path / "a.flac"))
    assert not list(tmp_path.iterdir())


# --- files -----------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_was(untrained, tmp_path):
    path = str(tmp_path / "m.safetensors")
    rvq_model.save_model(path, untrained)
    found = rvq_model.load_model(path)
    assert found.codec == SMALL
    assert found.figures == untrained.figures
    assert found.tensors.keys() == untrained.tensors.keys()
    for name, tensor in untrained.tensors.items():
        assert_array_equal(found.tensors[name], tensor)


def _without(model: Model) -> Model:
    tensors = dict(model.tensors)
    del tensors["encoder.0.bias"]
    return Model(model.codec, tensors, model.figures)


def _misshapen(model: Model) -> Model:
    name = "encoder.0.bias"
    return Model(model.codec, model.tensors | {name: np.zeros(5, np.float32)}, model.figures)


@pytest.mark.parametrize("change", [None, _without, _misshapen])
def test_a_damaged_model_is_refused(untrained, tmp_path, change):
    path = tmp_path / "m.safetensors"
    rvq_model.save_model(str(path), change(untrained) if change else untrained)
    if change is None:
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CommandError, match=r"m\.safetensors: not a model .*delete it"):
        rvq_model.load_model(str(path))


# --- the verb --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest: three real tracks to train on, one to test, one unreadable; one AI track."""
    rows = [("path", "label", "source", "group", "split")]
    for k, split in enumerate(["train", "train", "train", "test"]):
        write(tmp_path, f"{k}.wav", tones(9000 + 1000 * k, k))
        rows.append((f"{k}.wav", "0", f"site{k}", f"album{k}", split))
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    rows += [("bad.wav", "0", "site0", "bad", "train"), ("ai.wav", "1", "gen", "g", "train")]
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "data.csv"


@pytest.fixture
def rvq_command(command, data):
    def run(*args: Any, quiet: bool = True, steps: int = 4) -> Any:
        out, cache = data.parent / "out", data.parent / "cache"
        common = ["--data", data, "--out", out, "--cache", cache, "--steps", steps]
        return command("rvq", *common, *(["-q"] if quiet else []), *args)

    return run


def test_the_verb(rvq_command, data):
    done = rvq_command("--models", 1)
    assert done.code == 1  # the bad track
    assert [path.name for path in (data.parent / "out").glob("models/*")] == [
        f"{autoencoder.codecs(1, 0)[0].name}.safetensors"
    ]
    rows = read_manifest(data.parent / "out" / "manifest.csv")
    assert [row.group for row in rows] == [f"album{k}" for k in range(4)]
    for k, row in enumerate(rows):
        made, rate = soundfile.read(row.path)
        real, _ = soundfile.read(data.parent / f"{k}.wav")
        assert rate == 44_100
        assert len(made) == len(real)
        assert np.mean(made**2) == pytest.approx(np.mean(real**2), rel=1e-2)


def test_positives_and_resuming(rvq_command, data, monkeypatch):
    trained = []

    def train(codec, tracks, steps, seed, tell):
        trained.append((codec.name, len(tracks), steps))
        return random_model(codec, seed)

    monkeypatch.setattr(rvq, "train", train)
    done = rvq_command("--models", 2, "--per-track", 2, quiet=False)
    assert done.code == 1  # the bad track
    assert "bad.wav" in done.err
    assert "8 positives of 4 tracks" in done.err
    names = [codec.name for codec in autoencoder.codecs(2, 0)]
    assert [line.split()[0] for line in done.out.splitlines()[1:3]] == names
    assert "not trained on" in done.out
    assert trained == [(name, 3, 4) for name in names]
    out = data.parent / "out"
    rows = read_manifest(out / "manifest.csv")
    assert len(rows) == 8
    originals = {row.group: row for row in read_manifest(data)}
    for row in rows:
        original = originals[row.group]
        assert (row.label, row.kind) == (1, "codec-recon")
        assert row.split == original.split
        assert row.source == f"rvq-{original.source}"
        assert row.model.removeprefix("rvq-") in names
        assert dict(row.extra)["original"] == original.path
        assert soundfile.info(row.path).frames == soundfile.info(original.path).frames
    check_rows([*read_manifest(data), *rows])  # nothing leaks where nothing did

    # Killed while it trained the second model and wrote a track: the rest stays as it is.
    models = [out / "models" / f"{name}.safetensors" for name in names]
    tensors = rvq_model.load_model(str(models[1])).tensors
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*.flac")}
    kept = models[0].stat().st_mtime_ns, models[0].read_bytes()
    lost = sorted(before)[0]
    for path in (models[1], lost, out / "manifest.csv"):
        path.unlink()
    again = rvq_command("--models", 2, "--per-track", 2)
    assert again.code == 1
    assert trained[2:] == [(names[1], 3, 4)]
    assert (models[0].stat().st_mtime_ns, models[0].read_bytes()) == kept
    for name, tensor in rvq_model.load_model(str(models[1])).tensors.items():
        assert_array_equal(tensor, tensors[name])
    for path, (when, content) in before.items():
        assert path.read_bytes() == content
        assert path == lost or path.stat().st_mtime_ns == when
    assert read_manifest(out / "manifest.csv") == rows
    assert again.err.splitlines() == [line for line in done.err.splitlines() if "bad.wav" in line]

    other = rvq_command("--models", 2, "--per-track", 1)
    assert other.code == 2
    assert "holds another run (per_track 2 there, 1 here)" in other.err
    own = rvq_command("--data", out / "manifest.csv", "--models", 2, "--per-track", 2)
    assert own.code == 2
    assert "it is what the command writes" in own.err


def test_turns():
    names = ["a", "b", "c"]
    rows = [Row(f"x/{k}.wav", 0, "real", "s", "", "g", "") for k in range(300)]
    first = [rvq.turns(row, names, 1)[0] for row in rows]
    assert all(sorted(rvq.turns(row, names, 1)) == names for row in rows)
    assert all(70 < first.count(name) < 130 for name in names)
    moved = Row("/y/7.wav", 0, "real", "s", "", "g", "")
    assert rvq.turns(moved, names, 1) == rvq.turns(rows[7], names, 1)
    assert first != [rvq.turns(row, names, -1)[0] for row in rows]


def test_without_splits_a_tenth_of_the_groups_is_kept_back():
    rows = [Row(f"{k}", 0, "real", "s", "", f"g{k // 2}", "") for k in range(40)]
    tracks = [Track(row, tones(100), 1.0) for row in rows]
    train, rest, others = rvq._parts(tracks, 0)
    assert others
    assert len(rest) == 4
    assert len(train) == 36
    assert not {t.row.group for t in train} & {t.row.group for t in rest}
    assert rvq._parts(tracks[:2], 0) == (tracks[:2], tracks[:2], False)


def test_training_that_diverges_is_left_out(rvq_command, monkeypatch):
    monkeypatch.setattr(rvq_model, "crops", lambda *_: np.full((2, 4096), np.nan, np.float32))
    done = rvq_command("--models", 1)
    assert done.code == 1
    assert "it is left out" in done.err
    assert "diverged for every model" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_what_cannot_begin_says_so(rvq_command, data):
    done = rvq_command("--models", 1, "--per-track", 2)
    assert (done.code, done.out) == (2, "")
    assert "--per-track 2 is more than --models 1" in done.err
    text = data.read_text().splitlines()
    data.write_text("\n".join([text[0], text[-1]]) + "\n")
    done = rvq_command()
    assert (done.code, done.out) == (2, "")
    assert "no row is real" in done.err
    data.write_text("\n".join([text[0], text[4]]) + "\n")  # a track of the part "test"
    done = rvq_command()
    assert done.code == 2
    assert "nothing to train on" in done.err
    data.write_text("\n".join([text[0], text[5]]) + "\n")
    done = rvq_command()
    assert done.code == 1
    assert "bad.wav" in done.err
