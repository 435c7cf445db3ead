"""The paper's figures: parameter counts, work, shapes."""

import dataclasses

import pytest

from artifactnet_jax.config import CNN, Config, FrontEnd, Published, UNet
from artifactnet_jax.presets import flops, parameter_shapes
from artifactnet_jax.weights import parameter_counts


def test_v94_has_the_published_parameter_counts():
    assert parameter_counts(Config.v94()) == {"unet": 3603937, "cnn": 423553, "total": 4027490}
    assert Published().unet_parameters + Published().cnn_parameters == 4027490


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
    assert 3.0e6 <= counts["total"] <= 4.1e6
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
