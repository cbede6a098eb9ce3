"""Networks take images of any number of bands, and start from RGB weights as timm's rule says."""

from pathlib import Path

import pytest
import timm
import torch

from seglab.models import Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import FCNHead

FIRST = {"resnet18": "conv1", "convnext_atto": "stem.0", "test_efficientnet": "conv_stem"}


def network(bands: int, **options: object) -> Segmenter:
    encoder = TimmEncoder("test_resnet", in_channels=bands)
    return Segmenter(encoder, FCNHead(encoder.channels, 3, channels=8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
@pytest.mark.parametrize("name", FIRST)
def test_rgb_weights_are_adapted_by_the_documented_rule(
    tmp_path: Path, name: str, bands: int
) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = TimmEncoder(name, checkpoint_path=tmp_path / "w.pth", in_channels=bands)
    rgb = whole.get_parameter(f"{FIRST[name]}.weight").detach()
    found = encoder.model.get_parameter(f"{FIRST[name]}.weight").detach()
    if bands == 1:
        expected = rgb.sum(1, keepdim=True)
    else:
        expected = torch.stack([rgb[:, band % 3] for band in range(bands)], 1) * (3 / bands)
    torch.testing.assert_close(found, expected)
    image = torch.rand(1, bands, 64, 64)
    assert [x.shape[1] for x in encoder(image)] == list(encoder.channels)


def test_weights_of_as_many_bands_are_taken_as_they_are(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", in_chans=5).state_dict(), tmp_path / "w.pth")
    first, second = (
        TimmEncoder("resnet18", checkpoint_path=tmp_path / "w.pth", in_channels=5).state_dict()
        for _ in range(2)
    )
    stored = torch.load(tmp_path / "w.pth")
    assert torch.equal(first["model.conv1.weight"], stored["conv1.weight"])
    assert torch.equal(first["model.conv1.weight"], second["model.conv1.weight"])


def test_weights_of_other_bands_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", in_chans=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"conv1.weight \(64, 5, 7, 7\) in the file, \(64, 4"):
        TimmEncoder("resnet18", checkpoint_path=tmp_path / "w.pth", in_channels=4)


def test_three_bands_start_as_they_always_did() -> None:
    torch.manual_seed(0)
    plain = TimmEncoder("test_resnet").state_dict()
    torch.manual_seed(0)
    stated = TimmEncoder("test_resnet", in_channels=3).state_dict()
    assert all(torch.equal(plain[key], stated[key]) for key in plain)


@pytest.mark.parametrize("bands", [1, 5])
def test_normalization_is_one_number_per_band(bands: int) -> None:
    mean, std = [10.0 * band for band in range(bands)], [1.0 + band for band in range(bands)]
    net = network(bands, mean=mean, std=std)
    image = torch.rand(2, bands, 16, 16) * 255
    expected = torch.stack([(image[:, b] - mean[b]) / std[b] for b in range(bands)], 1)
    torch.testing.assert_close(net.normalize(image), expected)
    assert net.in_channels == bands


@pytest.mark.parametrize(
    "options", [{}, {"mean": [1.0] * 4}, {"mean": [1.0] * 4, "std": [1.0] * 3}]
)
def test_statistics_of_other_bands_are_refused(options: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"takes images of 4 band\(s\): give one of each per band"):
        network(4, **options)


def test_band_that_never_changes_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        network(2, mean=[0.0, 0.0], std=[1.0, 0.0])


def test_smp_networks_take_bands_too() -> None:
    net = SmpNetwork("Unet", "resnet18", 3, in_channels=5, mean=[1.0] * 5, std=[2.0] * 5).eval()
    assert net(torch.zeros(1, 5, 32, 40)).shape == (1, 3, 32, 40)
    with pytest.raises(ValueError, match=r"takes images of 5 band\(s\)"):
        SmpNetwork("Unet", "resnet18", 3, in_channels=5)


def test_no_bands_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 band, got 0"):
        TimmEncoder("test_resnet", in_channels=0)
