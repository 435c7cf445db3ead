"""Fetch the music that the default weights and the bank of decoders are made of; cut it; list it.

    python scripts/default_data.py sources open.tsv
    python scripts/default_data.py fetch MIRRORS
    python scripts/default_data.py cut MIRRORS CUT
    python scripts/default_data.py manifest CUT [--clips CLIPS/manifest.csv] -o data.csv
    python scripts/default_data.py shorts data.csv SHORTS

`sources` writes scripts/sources.csv, the facts of every file: where it is, what it is, its licence.
`fetch` brings what anyone can have: the repositories of scripts/sources.csv (`git clone`), Debian
packages by `apt-get download` and `dpkg-deb -x`, without installing them, and npm packages by
`npm pack`. What is there is left alone, so a folder of mirrors that somebody has serves too:
OWNER+NAME/repo for a repository, bare or plain, deb/PACKAGE, npm/PACKAGE-VERSION. What is gone is
named, and left out.

`cut` writes 60 s of every file as mono FLAC: the last 60 s of its first 100 s. A commit and a path
name a file's bytes for ever, and sha256 is checked where the list has it.

| what | class | licence |
| --- | --- | --- |
| scripts/sources.csv: files of public repositories | both | each its own; see the list |
| DEBIAN: music of games | real | free, each its own: usr/share/doc/NAME/copyright in it |
| npm weshop-music-package-NAME 0.1.0: tracks by Suno v5 | AI | CC0 1.0 |
| clips of demo pages (`--clips`), about 5 s each | both | of their authors; not distributed here |

A source gives MOST files at most, a game GAME, the npm packages PACKAGED. Files whose licence
forbids such a use (FORBIDS) are of the part "test": they are judged and not fitted to. What is
neither class (label `ambiguous`; the kinds APART) goes into a manifest of its own, data-apart.csv.

`shorts` is for `residuals` and `train`, which read whole recordings: a manifest of the
clips and of 10 s of six recordings of every other source, in the parts of data.csv.

`--clips` is a CSV with path (relative to it), label (1 AI or re-synthesised by a neural codec, 0
real), kind, source and model; such clips are cut from the demo pages of papers on generators and
codecs, and are not ours to pass on. MODEL_CARD.md lists their sources.

Rows that no split may part are of one `group`: a package, a demo page with both the originals and
what codecs made of them, and generators of one family (Stable Audio Open and what was distilled
from it, the MusicGen ones, the Presto ones), whichever page they come from. `split` is "train" for
what the network of the shipped weights has seen, "validation" for what it has not.

Not used, so that others can test on it: RESERVED.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from artifactnet_jax.data.manifest import Row, read_manifest, write_manifest
from artifactnet_jax.decode import open_audio
from artifactnet_jax.recording import AudioError

SOURCES = Path(__file__).parent / "sources.csv"
COLUMNS = (
    *("id", "repo", "commit", "path", "label", "kind", "system", "group", "licence", "year"),
    "sha256",
)
FORBIDS = re.compile(r"\bNC\b|\bND\b|academic|Bensound|non-commercial")
APART = ("restoration", "enhancement")
DOUBTED = {  # groups whose label is not believed
    "demo-audiosr ground truth music": "three of three carry lines every 100 Hz, as a vocoder with "
    "480 samples a frame at 48 kHz lays them: z up to 22 against decoders learnt elsewhere",
}
READ_S, CUT_S = 100, 60  # s of a file that are read; the last so many of them are kept
MOST, GAME, PACKAGED = 8, 6, 60  # files of a source, of a package of Debian, of all of npm
# What real music is, in the words of the model card, by the kinds of sources.csv.
KINDS = {
    "game": ("game", "game-loops", "game-chiptune", "chiptune"),
    "rock": ("rock-metal", "rock", "rock-pop", "metal", "home-rock-covers", "country"),
    "classical": (
        *("classical", "church-organ", "film-orchestral", "orchestral", "classical-winds"),
        "piano-solo",
    ),
    "folk": ("folk", "accordion", "singer-songwriter"),
    "jazz": ("jazz", "jazz-fusion", "piano-roll-ragtime"),
    "electronic": ("electronic", "dance-raggacore"),
    "rap": ("rap",),
    "live and home": ("choir-live", "phone-or-room-recording", "piano-home", "home-ukulele"),
    "stems and loops": (
        *("stems", "loops", "stems-electronic", "indie-stems", "singer-songwriter-stems", "vocal"),
        *("vocal-acappella", "percussion-samba", "solo-instrument"),
    ),
    "low rate": ("low-rate", "lossy-mp3"),
    "excerpts": ("music-excerpt", "library-music", "instrumental", "field-of-other"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
CLIP_KINDS = {  # of the real sources of the clips; others are excerpts
    "game": (
        *("beat-feet", "beatgame", "opensurge", "shattered-pixel-dungeon", "tuxemon"),
        *("hyperrogue", "opendungeons", "openrct2-openmusic"),
    ),
    "electronic": ("clue-cards-lofi", "digabi-muzak"),
    "stems and loops": ("sonic-pi-samples", "evf-cc0-stems", "mdn-webaudio"),
}
CLIP_KIND_OF = {name: kind for kind, names in CLIP_KINDS.items() for name in names}

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
MUSIC = {".ogg", ".opus", ".mp3"}
EXCERPT_S = 10  # s
SHORTS = {0: 6, 1: 60}  # of a source of long recordings, by label
MIN_S = 20.0  # s; shorter files in a game are effects
PAGES = ("codicodec", "flowdec", "bigvgan", "mucodec", "snac", "vbrrvq", "mrcqt")
FAMILIES = {
    "deb-kenta-cho": tuple(
        f"deb-{name}"
        for name in (
            *("gunroar", "mu-cade", "noiz2sa", "rrootage", "titanion", "torus-trooper", "tumiki"),
            "val-and-rick",
        )
    ),
    "deb-hyperrogue": ("deb-hyperrogue", "hyperrogue"),
    "demo-ditto2": ("ditto",),
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


def fetch(mirrors: Path) -> None:
    """Download and unpack whatever is missing below `mirrors`; name what is gone."""
    deb, npm = mirrors / "deb", mirrors / "npm"
    for name, work in missing(deb, DEBIAN):
        subprocess.run(["apt-get", "download", "-q", name], cwd=work, check=True)
        [package] = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(work)], check=True)
        package.unlink()
        for archive in work.rglob("*.pk3"):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(archive.with_suffix(""))
    for name, work in missing(npm, tuple(f"weshop-music-package-{n}-0.1.0" for n in SUNO)):
        package_name = name.removesuffix("-0.1.0") + "@0.1.0"
        subprocess.run(["npm", "pack", "--silent", package_name], cwd=work, check=True)
        [packed] = work.glob("*.tgz")
        subprocess.run(["tar", "xzf", packed.name], cwd=work, check=True)
        packed.unlink()
    with SOURCES.open(encoding="utf-8", newline="") as file:
        repositories = dict.fromkeys(row["repo"] for row in csv.DictReader(file))
    for repository in repositories:
        folder = mirrors / repository.replace("/", "+")
        if folder.exists():
            continue
        address = f"https://github.com/{repository}"
        clone = ["git", "clone", "--quiet", "--bare", address, str(folder / "repo")]
        if subprocess.run(clone, check=False).returncode:
            print(f"{repository} is gone: its files are left out", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)


def write_sources(listing: Path) -> None:
    """scripts/sources.csv from a list of files with the same columns, tab-separated."""
    with listing.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with SOURCES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["repo"], row["path"])))


def listed() -> dict[str, dict[str, str]]:
    """The rows of sources.csv by id; what is doubted is labelled ambiguous."""
    with SOURCES.open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        if row["group"] in DOUBTED:
            row["label"] = "ambiguous"
    return rows


def package_row(name: str) -> dict[str, str]:
    """What is known of a package's file, from its name, as of a row of sources.csv."""
    if name.startswith("npm-"):
        known = {"repo": "npm weshop-music-package", "group": "npm-weshop", "label": "ai"}
        return {**known, "id": name, "kind": "service", "system": "Suno v5", "year": "2025"}
    package = name.split("--")[0]
    group = group_of(package)
    known = {"repo": package.replace("deb-", "Debian "), "group": group, "label": "real"}
    return {**known, "id": name, "kind": "game", "system": "human", "year": ""}


def recordings(
    mirrors: Path, ids: Container[str] | None = None
) -> Iterator[tuple[dict[str, str], bytes]]:
    """Rows with the bytes of their files: of repositories and of packages, or those of `ids`."""
    for row in listed().values():
        if ids is not None and row["id"] not in ids:
            continue
        folder = mirrors / row["repo"].replace("/", "+") / "repo"
        git = folder / ".git" if (folder / ".git").is_dir() else folder
        name = f"{row['commit']}:{row['path']}"
        show = ["git", f"--git-dir={git}", "cat-file", "blob", name]
        result = subprocess.run(show, capture_output=True, check=False)
        if result.returncode or not result.stdout:
            print(f"{row['repo']}: {row['path']} is gone", file=sys.stderr)
        elif row["sha256"] and hashlib.sha256(result.stdout).hexdigest() != row["sha256"]:
            print(f"{row['repo']}: {row['path']} is another file", file=sys.stderr)
        else:
            yield row, result.stdout
    for kind in ("deb", "npm"):
        for folder in sorted((mirrors / kind).glob("*/")):
            for path in tracks(folder):
                name = f"{kind}-{folder.name}--{path.stem}"
                if ids is None or name in ids:
                    yield package_row(name), path.read_bytes()


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


def chosen(mirrors: Path) -> set[str]:
    """Ids of what is used: so many files of every source at most."""
    count = collections.Counter[tuple[str, ...]]()
    found = set()
    for row in listed().values():
        source = (row["group"], row["label"], row["system"])
        count[source] += 1
        if count[source] <= MOST:
            found.add(row["id"])
    for kind, most in (("deb", GAME), ("npm", PACKAGED)):
        for folder in sorted((mirrors / kind).glob("*/")):
            for path in tracks(folder):
                source = (kind, folder.name if kind == "deb" else "")
                if path.name != BROKEN.get(folder.name) and count[source] < most:
                    count[source] += 1
                    found.add(f"{kind}-{folder.name}--{path.stem}")
    return found


def cut(mirrors: Path, folder: Path) -> None:
    """Write CUT_S seconds of every file that is used, as mono FLAC."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name for name in chosen(mirrors) if not (folder / f"{name}.flac").exists()}
    with ProcessPoolExecutor() as pool:
        waiting = collections.deque[Any]()
        for row, data in recordings(mirrors, wanted):
            waiting.append(pool.submit(cut_one, row["id"], data, folder))
            while len(waiting) > 8:
                waiting.popleft().result()
        for one in waiting:
            one.result()


def cut_one(name: str, data: bytes, folder: Path) -> None:
    """Write one file; what cannot be read is named."""
    blocks, seconds = [], 0.0
    try:
        with open_audio(io.BytesIO(data)) as decoded:
            for block in decoded.blocks:
                blocks.append(block.mean(axis=1))
                seconds += len(block) / decoded.rate
                if seconds >= READ_S:
                    break
    except AudioError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return
    audio = np.concatenate(blocks)[: READ_S * decoded.rate][-CUT_S * decoded.rate :]
    part = folder / f".{name}.flac"
    soundfile.write(part, np.clip(audio, -1, 1), decoded.rate, subtype="PCM_16")
    part.rename(folder / f"{name}.flac")


def group_of(source: str) -> str:
    """What a package, or a source of the clips, belongs to."""
    for page in PAGES:
        if source.startswith(page):
            return page
    for family, beginnings in FAMILIES.items():
        if source.startswith(beginnings):
            return family
    return source


def clip_group(source: str) -> str:
    """The group of a source of the clips."""
    group = group_of(source)
    return group if group.startswith(("deb-", "demo-")) else f"clip-{group}"


def excerpt(audio: Any, rng: Any, seconds: int = EXCERPT_S) -> Any:
    """So many seconds from anywhere in a recording [n, ...] at 44.1 kHz, or all of it."""
    length = min(len(audio), seconds * 44_100)
    start = int(rng.integers(0, len(audio) - length + 1))
    return audio[start : start + length]


def manifest(folder: Path, clips: Path | None, output: Path) -> None:
    """Write the manifest of everything that is there; what is neither class, beside it."""
    rows: list[Row] = []
    apart: list[Row] = []
    sources = listed()
    for path in sorted(folder.glob("*.flac")):
        row = sources.get(path.stem) or package_row(path.stem)
        label, kind = row["label"], KIND_OF.get(row["kind"], row["kind"])
        neither = label == "ambiguous" or row["kind"] in APART
        if label == "recon":
            kind = "codec-recon"
        source = row["group"] if label == "real" else f"{row['group']}: {row['system']}"
        part = "validation"
        if path.stem.startswith("npm-") or (
            path.stem.startswith("deb-") and not path.stem.startswith(UNSEEN)
        ):
            part = "train"
        if FORBIDS.search(row.get("licence", "")):
            part = "test"
        where = str(path.resolve())
        value = int(label != "real")
        found = Row(where, value, kind, source, row["system"], row["group"], part)
        (apart if neither else rows).append(found)
    known = set()
    if clips is not None:
        with clips.open(newline="") as file:
            for row in csv.DictReader(file):
                where = str((clips.parent / row["path"]).resolve())
                if where in known:
                    continue
                known.add(where)
                source, kind = row["source"], row["kind"]
                if kind == "real":
                    kind = CLIP_KIND_OF.get(source, "excerpts")
                part = "validation" if source.startswith(UNSEEN) else "train"
                label, group = int(row["label"]), clip_group(source)
                rows.append(Row(where, label, kind, source, row["model"], group, part))
    seen = {row.group for row in rows if row.split == "train"}
    rows = [dataclasses.replace(r, split="train") if r.group in seen else r for r in rows]
    write_manifest(output, rows)
    write_manifest(output.with_name(f"{output.stem}-apart.csv"), apart)
    print(f"{output}: {len(rows)} tracks, {len({r.group for r in rows})} groups", file=sys.stderr)


def shorts(data: Path, folder: Path, cache: str | None) -> None:
    """Write excerpts of long recordings, and a manifest of them and of the short ones."""
    from artifactnet_jax.data.decoded import AudioCache

    store, rng = AudioCache(cache), np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[Row]] = {}
    for row in read_manifest(data):
        sources.setdefault(row.source, []).append(row)
    written = []
    for _, rows in sorted(sources.items()):
        rng.shuffle(rows)
        long = Path(rows[0].path).suffix == ".flac"  # what was cut
        for row in rows[: SHORTS[rows[0].label]] if long else rows:
            path = Path(row.path)
            if long:
                path = folder / f"{Path(row.path).stem}.flac"
                soundfile.write(path, excerpt(store.get(row.path), rng), 44_100)
            plain = dataclasses.replace(row, path=str(path), residual="", weight=1.0, extra=())
            written.append(plain)
    write_manifest(folder / "manifest.csv", written)
    print(f"{folder}: {len(written)} recordings", file=sys.stderr)


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description="data of the default weights; see the docstring")
    steps = parser.add_subparsers(dest="step", required=True)
    arguments = {
        "sources": ("listing",),
        "fetch": ("mirrors",),
        "cut": ("mirrors", "folder"),
        "manifest": ("folder",),
        "shorts": ("data", "folder"),
    }
    for name, places in arguments.items():
        step = steps.add_parser(name)
        for place in places:
            step.add_argument(place, type=Path)
        if name == "manifest":
            step.add_argument("--clips", type=Path)
            step.add_argument("-o", "--output", type=Path, required=True)
        if name == "shorts":
            step.add_argument("--cache")
    given = vars(parser.parse_args())
    step = given.pop("step")
    run = {"sources": write_sources, "fetch": fetch, "cut": cut, "manifest": manifest}
    run |= {"shorts": shorts}
    run[step](**given)


if __name__ == "__main__":
    main()
