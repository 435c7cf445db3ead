"""Fetch the music that the default weights are trained on, and write its manifest.

    python scripts/default_data.py fetch RAW
    python scripts/default_data.py manifest RAW --clips CLIPS/manifest.csv -o data.csv
    python scripts/default_data.py excerpts data.csv EXCERPTS
    python scripts/default_data.py inverted EXCERPTS INVERTED
    python scripts/default_data.py shorts data.csv SHORTS

`fetch` brings what anyone can install, without installing it: Debian packages by `apt-get download`
and `dpkg-deb -x` (about 3.4 GB), npm packages by `npm pack` (0.2 GB). What is there is left alone.

| what | class | licence |
| --- | --- | --- |
| DEBIAN: music of games | real | free, each its own: usr/share/doc/NAME/copyright in it |
| npm weshop-music-package-NAME 0.1.0: 166 tracks by Suno v5 | AI | CC0 1.0 |
| clips of demo pages (`--clips`), about 5 s each | both | of their authors; not distributed here |

`excerpts` writes 10 s of five recordings of every real source, for `artifactnet-jax rvq`.
`inverted` makes of 5 s of each what a vocoder that learnt nothing would: a mel spectrogram of
random size, in half of them with a little noise, turned back into sound by the pseudo-inverse and
Griffin and Lim's iteration (librosa). Like those of `rvq` they are AI recordings to fit to, and are
not judged. `shorts` is for `residuals` and `train`, which read whole recordings: a manifest of the
clips and of 10 s of six recordings of every game and of sixty tracks by Suno, in the parts of
data.csv.

`--clips` is a CSV with path (relative to it), label (1 AI or re-synthesised by a neural codec, 0
real), kind, source and model; such clips are cut from the demo pages of papers on generators and
codecs, and are not ours to pass on. MODEL_CARD.md lists their sources. Without them the manifest
has one generator only, which is not enough.

Rows that no split may part are of one `group`: a package, a demo page with both the originals and
what codecs made of them, and generators of one family (Stable Audio Open and what was distilled
from it, the MusicGen ones, the Presto ones), whichever page they come from. `split` is "train" for
what the network of the shipped weights has seen, "validation" for what it has not.

The music of games is of the kind "game": it is most of the real music, and easy; `texture` counts
it no more than all other real music where it sets thresholds.

Not used, so that others can test on it: RESERVED.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import soundfile

from artifactnet_jax.data.manifest import Row, read_manifest, write_manifest

# What the network of the shipped weights was trained on (but for UNSEEN), and what came later.
FIRST = (
    *("berusky2-data", "colobot-common-sounds", "drascula-music", "flare-game"),
    *("freedroidrpg-data", "fretsonfire-songs-muldjord", "fretsonfire-songs-sectoid"),
    *("hedgewars-data", "hyperrogue-music", "marsshooter-data", "naev-data", "nexuiz-music"),
    *("openclonk-data", "planetblupi-music-ogg", "singularity-music", "starfighter-data"),
    *("supertux-data", "trackballs-data", "warzone2100-music", "wesnoth-1.16-music"),
    *("wizznic-data",),
)
LATER = (
    *("abe-data", "amoebax-data", "asc-music", "btanks-data", "bumprace-data"),
    *("caveexpress-data", "endless-sky-data", "enigma-data", "fillets-ng-data"),
    *("extremetuxracer-data", "freeorion-data", "frozen-bubble-data", "glob2-data"),
    *("gunroar-data", "hex-a-hop-data", "lincity-ng-data", "lordsawar-data", "mu-cade-data"),
    *("noiz2sa-data", "pathological", "pinball-data", "powermanga-data", "pushover-data"),
    *("raincat-data", "rrootage-data", "scorched3d-data", "titanion-data", "torcs-data"),
    *("torus-trooper-data", "tumiki-fighters-data", "val-and-rick-data", "warmux-data"),
    *("xmoto-data", "zaz-data"),
)
DEBIAN = tuple(sorted((*FIRST, *LATER)))
RESERVED = (
    *("0ad-data", "megaglest-data", "redeclipse-data", "supertuxkart-data", "ufoai-music"),
    *("unknown-horizons", "valyriatear", "widelands-data", "immich-memories-music (PyPI)"),
)
SUNO = (
    *("activities", "ambient-lofi", "asian-lofi", "chillhop", "funk-soul", "hybrid", "jazzhop"),
    *("late-night", "seasonal-weather", "soul-rnb"),
)
BROKEN = {"wesnoth-1.16-music": "northerners.ogg"}  # its end does not decode
MUSIC = {".ogg", ".oga", ".opus", ".mp3", ".flac"}
EXCERPTS, EXCERPT_S = 5, 10  # of a source; seconds
INVERTED_S = 5  # s of an excerpt; what follows is drawn from for each
STFTS = ((1024, 256), (2048, 512), (1024, 512), (2048, 256), (1920, 480), (1280, 320))  # n_fft, hop
MELS = (64, 80, 96, 128, 160, 200)
MEL_TOPS = (12_000, 16_000, 20_000, 22_050)  # Hz
ROUNDS = (4, 8, 16, 32)  # of Griffin and Lim's iteration
SHORTS = {0: 6, 1: 60}  # of a source of long recordings, by label
SILENT = 1e-3  # root mean square of an excerpt that is left out
MIN_S = 20.0  # s; shorter files in a game are effects
PAGES = ("codicodec", "flowdec", "bigvgan", "mucodec", "snac", "vbrrvq", "mrcqt")
FAMILIES = {
    "kenta-cho": tuple(
        f"deb-{name}"
        for name in (
            *("gunroar", "mu-cade", "noiz2sa", "rrootage", "titanion", "torus-trooper", "tumiki"),
            "val-and-rick",
        )
    ),
    "hyperrogue": ("deb-hyperrogue",),
    "stable-audio": ("arc", "sao-prestosite", "stable-audio-open"),
    "presto": ("presto",),
    "musicgen": ("musicgen", "m2ugen"),
}
# Held out when the network was trained, or added later.
UNSEEN = (
    *("ace-step-v1", "digabi-muzak", "evf-cc0-stems", "m2ugen", "mucodec", "musicgen"),
    *("musichifi-fma-gt", "snac", "songcreator", "sonic-pi-samples", "tuxemon", "yue"),
    *("deb-drascula-music", "deb-hedgewars-data", "deb-warzone2100-music"),
    *("deb-hyperrogue-music", "deb-openclonk-data", "deb-starfighter-data"),
    *("deb-trackballs-data", "deb-wizznic-data", "hyperrogue"),
    *(f"deb-{name}" for name in LATER),
)


def missing(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Each name that is not in the folder yet, and where to put it: named when it is all there."""
    for name in names:
        if (folder / name).exists():
            continue
        print(name, file=sys.stderr)
        work = folder / f".{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield name, work
        work.rename(folder / name)


def fetch(raw: Path) -> None:
    """Download and unpack whatever is missing below `raw`."""
    deb, npm = raw / "deb", raw / "npm"
    for name, work in missing(deb, DEBIAN):
        subprocess.run(["apt-get", "download", "-q", name], cwd=work, check=True)
        [package] = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(work)], check=True)
        package.unlink()
        for archive in work.rglob("*.pk3"):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(archive.with_suffix(""))
    for name, work in missing(npm, SUNO):
        package_name = f"weshop-music-package-{name}@0.1.0"
        subprocess.run(["npm", "pack", "--silent", package_name], cwd=work, check=True)
        [packed] = work.glob("*.tgz")
        subprocess.run(["tar", "xzf", packed.name], cwd=work, check=True)
        packed.unlink()


def tracks(folder: Path) -> list[Path]:
    """Recordings of at least MIN_S seconds, in order of their names."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in MUSIC and path.is_file() and not path.is_symlink():
            try:
                seconds = soundfile.info(path).duration
            except soundfile.LibsndfileError:
                continue
            if seconds >= MIN_S:
                found.append(path)
    return found


def group_of(source: str) -> str:
    """What a source of the clips belongs to."""
    for page in PAGES:
        if source.startswith(page):
            return page
    for family, beginnings in FAMILIES.items():
        if source.startswith(beginnings):
            return family
    return source


def excerpt(audio: Any, rng: Any, seconds: int = EXCERPT_S) -> Any:
    """So many seconds from anywhere in a recording [n, ...] at 44.1 kHz, or all of it."""
    length = min(len(audio), seconds * 44_100)
    start = int(rng.integers(0, len(audio) - length + 1))
    return audio[start : start + length]


def manifest(raw: Path, clips: Path | None, output: Path) -> None:
    """Write the manifest of everything that is there."""
    rows: list[Row] = []

    def add(path: str, label: int, kind: str, source: str, model: str, group: str) -> None:
        part = "validation" if source.startswith(UNSEEN) else "train"
        rows.append(Row(path, label, kind, source, model, group, part))

    for name in DEBIAN:
        group = group_of(f"deb-{name}")
        for path in tracks(raw / "deb" / name):
            if path.name == BROKEN.get(name):
                continue
            add(str(path.resolve()), 0, "game", f"deb-{name}", "", group)
    for name in SUNO:
        for path in tracks(raw / "npm" / name):
            add(str(path.resolve()), 1, "ai", "suno-v5", "Suno v5", "suno")
    seen = set()
    if clips is not None:
        with clips.open(newline="") as file:
            for row in csv.DictReader(file):
                path = str((clips.parent / row["path"]).resolve())
                if path not in seen:
                    seen.add(path)
                    source, label = row["source"], int(row["label"])
                    add(path, label, row["kind"], source, row["model"], group_of(source))
    write_manifest(output, rows)
    print(f"{output}: {len(rows)} tracks, {len({r.group for r in rows})} groups", file=sys.stderr)


def excerpts(data: Path, folder: Path, cache: str | None) -> None:
    """Write mono FLAC excerpts of real recordings, each in the group of its original."""
    import numpy as np

    from artifactnet_jax.data.decoded import AudioCache, prepare

    store, rng = AudioCache(cache), np.random.default_rng(7)
    rows, _ = prepare(read_manifest(data), store, max_bad=0.05, jobs=2)
    folder.mkdir(parents=True, exist_ok=True)
    real: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.label == 0:
            real.setdefault(row.source, []).append(number)
    written = []
    for source in sorted(real):
        rng.shuffle(real[source])
        for number in real[source][:EXCERPTS]:
            audio = excerpt(store.get(rows[number].path), rng)
            mono = audio.astype(np.float32).mean(axis=1) / 32768
            if np.sqrt(np.mean(mono**2)) < SILENT:
                continue
            path = folder / f"{number}.flac"
            soundfile.write(path, mono, 44_100)
            written.append(Row(str(path), 0, "real", source, "", rows[number].group, ""))
    write_manifest(folder / "manifest.csv", written)
    print(f"{folder}: {len(written)} excerpts", file=sys.stderr)


def inverted(excerpts: Path, folder: Path) -> None:
    """Write excerpts after `invert`, each in the group of its original."""
    rows = read_manifest(excerpts / "manifest.csv")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{Path(row.path).stem}.flac" for row in rows]
    with ProcessPoolExecutor() as pool:
        heard = pool.map(invert, range(len(rows)), [row.path for row in rows], paths, chunksize=8)
        written = [
            Row(str(path), 1, "codec-recon", f"mel-{row.source}", "mel-inversion", row.group, "")
            for path, row, audible in zip(paths, rows, heard, strict=True)
            if audible
        ]
    write_manifest(folder / "manifest.csv", written)
    print(f"{folder}: {len(written)} recordings", file=sys.stderr)


def invert(seed: int, source: str, path: Path) -> bool:
    """Write `INVERTED_S` of a recording after its mel spectrogram has been turned back into sound.

    False, and nothing is written, where they are silent.
    """
    import librosa
    import numpy as np
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    audio, rate = soundfile.read(source, dtype="float32")
    audio = excerpt(audio, rng, INVERTED_S)
    if np.sqrt(np.mean(audio**2)) < SILENT:
        return False
    n_fft, hop = STFTS[rng.integers(len(STFTS))]
    mel = librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=int(rng.choice(MELS)), fmax=float(rng.choice(MEL_TOPS))
    )
    kept = mel @ np.abs(librosa.stft(audio, n_fft=n_fft, hop_length=hop))
    if rng.random() < 0.5:
        error = rng.standard_normal(kept.shape) * rng.uniform(0, 0.2)  # as of a model, in nepers
        kept = (kept * np.exp(error)).astype(np.float32)
    with threadpool_limits(1, "blas"):
        magnitude = np.maximum(np.linalg.pinv(mel) @ kept, 0)
    sound = librosa.griffinlim(
        magnitude,
        n_iter=int(rng.choice(ROUNDS)),
        hop_length=hop,
        n_fft=n_fft,
        length=len(audio),
        momentum=float(rng.choice((0, 0.99))),
        random_state=seed,
    )
    sound *= np.sqrt(np.mean(audio**2) / max(np.mean(sound**2), 1e-9))
    soundfile.write(path, sound / max(1.0, 1.01 * np.abs(sound).max()), rate)
    return True


def shorts(data: Path, folder: Path, cache: str | None) -> None:
    """Write excerpts of long recordings, and a manifest of them and of the short ones."""
    import numpy as np

    from artifactnet_jax.data.decoded import AudioCache

    store, rng = AudioCache(cache), np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[Row]] = {}
    for row in read_manifest(data):
        sources.setdefault(row.source, []).append(row)
    written = []
    for source, rows in sorted(sources.items()):
        rng.shuffle(rows)
        long = source.startswith("deb-") or source == "suno-v5"
        for number, row in enumerate(rows[: SHORTS[rows[0].label]] if long else rows):
            path = Path(row.path)
            if long:
                path = folder / f"{source}-{number}.flac"
                soundfile.write(path, excerpt(store.get(row.path), rng), 44_100)
            plain = dataclasses.replace(row, path=str(path), residual="", weight=1.0, extra=())
            written.append(plain)
    write_manifest(folder / "manifest.csv", written)
    print(f"{folder}: {len(written)} recordings", file=sys.stderr)


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description="data of the default weights; see the docstring")
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("fetch")
    first.add_argument("raw", type=Path)
    second = steps.add_parser("manifest")
    second.add_argument("raw", type=Path)
    second.add_argument("--clips", type=Path)
    second.add_argument("-o", "--output", type=Path, required=True)
    third = steps.add_parser("inverted")
    third.add_argument("excerpts", type=Path)
    third.add_argument("folder", type=Path)
    for name in ("excerpts", "shorts"):
        step = steps.add_parser(name)
        step.add_argument("data", type=Path)
        step.add_argument("folder", type=Path)
        step.add_argument("--cache")
    args = parser.parse_args()
    if args.step == "fetch":
        fetch(args.raw)
    elif args.step == "inverted":
        inverted(args.excerpts, args.folder)
    elif args.step in ("excerpts", "shorts"):
        make = excerpts if args.step == "excerpts" else shorts
        make(args.data, args.folder, args.cache)
    else:
        manifest(args.raw, args.clips, args.output)


if __name__ == "__main__":
    main()
