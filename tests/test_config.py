"""The paper's figures: parameter counts, work, shapes."""

import dataclasses

import pytest

from artifactnet_jax.config import CNN, Config, FrontEnd, Imported, UNet
from artifactnet_jax.layers import layer
from artifactnet_jax.presets import flops, parameter_shapes
from artifactnet_jax.weights import parameter_counts


def test_v94_has_the_published_parameter_counts():
    assert parameter_counts(Config.v94()) == {"unet": 3603937, "cnn": 423553, "total": 4027490}


def test_v94_encoder_blocks_match_the_hand_count():
    shapes = parameter_shapes(Config.v94())

    def count(prefix):
        total = 0
        for name, shape in shapes.items():
            if name.startswith(prefix) and not name.endswith((".mean", ".var")):
                size = 1
                for n in shape:
                    size *= n
                total += size
        return total

    # conv 3x3, batch norm (2 per feature), conv 3x3, batch norm, 1x1 shortcut with bias
    assert count("unet.encoder.0.") == 9 * 32 + 64 + 9 * 32 * 32 + 64 + 32 + 32 == 9696
    assert count("unet.encoder.1.") == 57664
    assert count("unet.encoder.2.") == 230016
    assert count("unet.down.0.") == 16 * 32 * 32 + 32
    assert count("unet.up.0.") == 4 * 256 * 128 + 128


def test_edge_is_as_large_but_at_most_12_gflop():
    counts = parameter_counts(Config.edge())
    assert counts["texture"] < 0.03 * counts["total"]
    assert 3.0e6 <= counts["total"] <= 4.2e6
    assert flops(Config.edge())["total"] <= 12e9


def test_v94_needs_132_gflop():
    work = flops(Config.v94())
    assert work["unet"] == pytest.approx(130.4e9, rel=1e-3)
    assert work["cnn"] == pytest.approx(1.4e9, rel=1e-2)
    assert work["total"] == work["unet"] + work["cnn"]


def test_work_by_hand():
    front_end = FrontEnd(segment_samples=14 * 64, n_fft=30, hop=64, stft_pad=15, n_mels=8)
    config = Config("tiny", front_end, UNet(widths=(3,), bottleneck=5), CNN(widths=(2,), hidden=4))
    assert (front_end.n_bins, front_end.n_frames) == (16, 15)
    full, half = 16 * 16, 8 * 8  # 15 frames are padded to 16
    unet = full * (9 * 3 + 81 + 3) + half * 16 * 9  # encoder block with shortcut, down
    unet += half * (9 * 15 + 9 * 25 + 15 + 19 * 25)  # bottom, gated
    unet += half * 4 * 15 + full * (9 * 18 + 81 + 18) + full * 3  # up, decoder block, head
    cnn = 8 * 15 * 9 * 7 * 2 + 2 * 4 + 4
    assert flops(config) == {"unet": 2 * unet, "cnn": 2 * cnn, "total": 2 * (unet + cnn)}


def test_both_presets_see_the_same_spectrogram():
    for config in (Config.v94(), Config.edge()):
        front_end = config.front_end
        assert (front_end.n_bins, front_end.n_frames) == (1025, 345)
        assert front_end.segment_s == 4.0
        assert config.unet.mask_max == 0.5


def test_round_trip_through_plain_data_and_digest():
    for config in (Config.v94(), Config.edge()):
        again = Config.from_dict(config.to_dict())
        assert again == config
        assert again.digest() == config.digest()
        assert hash(again) == hash(config)
    other = dataclasses.replace(Config.edge(), front_end=FrontEnd(hpss_eps=1e-10))
    assert other.digest() != Config.edge().digest()


def test_unknown_or_missing_keys_are_named():
    data = Config.edge().to_dict()
    data["unet"]["depth"] = 4
    with pytest.raises(ValueError, match="depth"):
        Config.from_dict(data)
    data = Config.edge().to_dict()
    del data["cnn"]
    with pytest.raises(ValueError, match="cnn"):
        Config.from_dict(data)
    with pytest.raises(ValueError, match="v95"):
        Config.from_preset("v95")
    assert Config.from_preset("edge") == Config.edge()


NUMBER = "it must be a number above 0"


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        # The values that an earlier state took without a word.
        ("verdict", "threshold", "high", "it must be a number from 0 to 1"),
        ("verdict", "aggregate", "best", "it must be one of median, rms, mean"),
        ("unet", "mask_max", 7, "it must be from 0 to 1"),
        ("front_end", "hop", -3, "it must be above 0"),
        ("front_end", "joint", "songs", "it must be one of segment, view, song, song_view"),
        ("front_end", "top_db", -80, "it must be above 0 or none"),
        ("front_end", "mel_scale", "bark", "it must be one of slaney, htk, given"),
        ("front_end", "mel_norm", "area", "it must be one of slaney, none"),
        ("front_end", "amin_rule", "maximum", "it must be one of max, add"),
        # A bool is no number, a number is finite, a list has its length.
        ("front_end", "hop", True, "it must be a whole number above 0"),
        ("front_end", "hop", 512.0, "it must be a whole number above 0"),
        ("front_end", "amin", float("nan"), NUMBER),
        ("front_end", "amin", float("inf"), NUMBER),
        ("front_end", "amin", 10**400, NUMBER),
        ("front_end", "hpss_width", 30, "it must be above 0 and odd"),
        ("front_end", "n_fft", 10**6, r"more than segment_samples \+ 2 \* stft_pad"),
        ("front_end", "channels", ["mel"], "it must be a list, each one of mel_res, mel_H"),
        ("front_end", "channels", "mel_H", "it must be a list"),
        ("front_end", "channels", [], "it must be one or more"),
        ("unet", "patch", [8, 8, 8], "it must be a list of 2"),
        ("unet", "patch", [8, 0], "it must be a list, each above 0"),
        ("texture", "edges", [100.0, 50.0], "it must be two or more, rising"),
        ("texture", "edges", [], "it must be two or more, rising"),
        ("texture", "edges", [100.0, 30_000.0], "above half of front_end.sample_rate"),
        ("verdict", "operating_points", [["fpr1", 1.5]], "each a list, each from 0 to 1"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(section, key, value, allowed):
    data = Config.edge().to_dict()
    data[section][key] = value
    with pytest.raises(ValueError, match=rf"^{section}\.{key}=.*{allowed}"):
        Config.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"), [("front_end", 5), ("unet", "layers"), ("cnn", None), ("preset", 3)]
)
def test_a_section_that_is_no_table_and_a_preset_that_is_no_text_are_named(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value!r}: it must be a t(able|ext)$"):
        Config.from_dict({**Config.edge().to_dict(), key: value})
    with pytest.raises(ValueError, match=r"^config=\[\]: it must be a table"):
        Config.from_dict([])


def test_whole_numbers_may_stand_for_numbers_and_stay_as_they_are():
    data = Config.edge().to_dict()
    data["front_end"]["top_db"] = 80
    assert type(Config.from_dict(data).front_end.top_db) is int


def test_layers_of_a_converted_network_are_checked():
    front_end = FrontEnd(segment_samples=1024, n_fft=30, hop=64, stft_pad=15)
    plane = (1, front_end.n_bins, front_end.n_frames)
    mask = layer("mask", "sigmoid", ["input"])

    def make(*layers, cnn=CNN()):  # noqa: B008
        return Config("x", front_end, Imported(layers), cnn)

    assert make(mask).unet.layers == (mask,)
    wrong = [
        (layer("up", "relu", ["nowhere"]), "unet.layers: layer 'up' .* reads 'nowhere'"),
        (layer("up", "reloo", ["input"]), "unet.layers: layer 'up' .*no such operator"),
        (layer("e", "elu", ["input"], {"alpha": "1"}), "layers.e.alpha='1': it must be a number"),
        (
            layer("p", "max_pool", ["input"], {"kernel": (2, 2)}),
            rf"'p' has shape .* not \({plane[0]}",
        ),
        (layer("g", "gelu", ["input"], {"approximate": "no"}), "it must be one of none, tanh"),
        (layer("g", "gelu", ["input"], {"approximately": "none"}), "unknown attribute"),
        (layer(7, "relu", ["input"]), "layers.7.name=7: it must be a text"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            make(bad)
    with pytest.raises(ValueError, match=r"cnn.layers: 'a' has shape .* not \(1,\)"):
        make(mask, cnn=Imported((layer("a", "relu", ["input"]),)))
