"""From a folder to predictions with nothing edited: `init`, `fit`, `predict`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from seglab.checkpoints import read_checkpoint
from seglab.data.sources.masks import read_mask

RNG = np.random.default_rng(0)
SHAPE = (40, 48)


def write_bands(root: Path, n_images: int = 10) -> None:
    """Four bands of 16 bits in TIFF; the fourth tells the classes apart."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(n_images):
        mask = np.zeros(SHAPE, np.uint8)
        mask[:, : 10 + 2 * number] = 255
        bands = RNG.integers(300, 900, (*SHAPE, 4)).astype(np.uint16)
        bands[..., 3] += np.uint16(3000) * (mask > 0)
        tifffile.imwrite(
            root / f"images/{number}.tif", bands, photometric="minisblack", planarconfig="contig"
        )
        Image.fromarray(mask).save(root / f"masks/{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("bands")
    write_bands(root / "set")
    run("init", root / "set", "--output", root / "mine.yaml")
    run(
        *("fit", "--config", root / "mine.yaml", "--trainer.default_root_dir", root / "logs"),
        *("--trainer.max_steps", 4, "--trainer.val_check_interval", 4, "--trainer.accelerator=cpu"),
        *("--model.scheduler.init_args.warmup_steps", 1, "--data.num_workers", 0),
        *("--scale_equalization.max_batches", 2, "--trainer.enable_progress_bar=false"),
    )
    return root


def test_four_deep_bands_train_with_nothing_edited(trained: Path) -> None:
    config = yaml.safe_load((trained / "mine.yaml").read_text())
    network, data = config["model"]["network"]["init_args"], config["data"]["init_args"]
    assert data["channels"] == network["encoder"]["init_args"]["in_channels"] == 4
    assert data["value_range"] == [0.0, 4095.0]
    raw = [tifffile.imread(path) for path in sorted((trained / "set/images").iterdir())]
    bands = np.stack(raw).astype(np.float64) * (255 / 4095)
    np.testing.assert_allclose(network["mean"], bands.mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(network["std"], bands.std((0, 1, 2)), rtol=1e-3)
    state = read_checkpoint(trained / "logs/mine/version_0/checkpoints/last.ckpt")["state_dict"]
    assert state["network.encoder.model.conv1.weight"].shape[1] == 4


def test_four_deep_bands_are_predicted(trained: Path, run: Callable[..., None]) -> None:
    run(
        *("predict", "--ckpt_path", trained / "logs/mine/version_0/checkpoints/last.ckpt"),
        *("--data.predict_folder", trained / "set/images", "--data.num_workers", 0),
        *("--trainer.default_root_dir", trained / "logs", "--trainer.accelerator=cpu"),
        "--trainer.enable_progress_bar=false",
    )
    masks = sorted((trained / "logs").rglob("predict_0/**/masks/*.png"))
    assert [path.stem for path in masks] == [str(number) for number in range(10)]
    assert all(read_mask(path).shape == SHAPE for path in masks)


def test_library_reads_what_the_run_trained_on(trained: Path) -> None:
    import seglab

    model = seglab.load(trained / "logs/mine/version_0/checkpoints/last.ckpt", device="cpu")
    path = trained / "set/images/3.tif"
    raw = tifffile.imread(path)
    assert (model.predict(path) == model.predict(raw)).all()
    assert model.overlay(path).shape == (*SHAPE, 3)
    scaled = torch.from_numpy(raw.astype(np.float32) * np.float32(255 / 4095)).permute(2, 0, 1)
    with torch.inference_mode():
        expected = model.task.network(scaled[None]).argmax(1)[0].numpy()
    assert (model.predict(path) == expected).mean() > 0.99


def test_other_bands_than_the_networks_are_one_sentence(
    trained: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((trained / "mine.yaml").read_text())
    network = config["model"]["network"]["init_args"]
    del network["mean"], network["std"], network["encoder"]["init_args"]["in_channels"]
    (trained / "rgb.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        run("fit", "--config", trained / "rgb.yaml", "--trainer.default_root_dir", trained / "no")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seglab:")]
    assert "images of 4 band(s), but the network takes 3: set in_channels" in line
