"""Data modules that read files: finding, downloading, splitting, augmenting."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_prune.recipes import files
from lightning_prune.recipes.data import CIFAR10, MNIST, FashionMNIST
from lightning_prune.recipes.image_files import FileData, augmented_batch, crop_and_flip

from .samples import (
    cifar_bytes,
    idx_bytes,
    random_images,
    sha256,
    write_cifar,
    write_cifar_archive,
    write_mnist,
)


def ready(data: FileData) -> FileData:
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
def test_mnist_is_found_in_every_place_gzipped_or_not(tmp_path: Path, place: str, gz: bool):
    contents = write_mnist(tmp_path / place, gz=gz)
    parts = ready(MNIST(str(tmp_path), val_size=5)).parts
    assert [tuple(x.shape) for x, _ in parts] == [(15, 1, 28, 28), (5, 1, 28, 28), (6, 1, 28, 28)]
    images = contents["t10k-images-idx3-ubyte"].float() / 255
    assert torch.allclose(parts.test[0][:, 0], (images - 0.1307) / 0.3081, atol=1e-5)
    assert torch.equal(parts.test[1], contents["t10k-labels-idx1-ubyte"].long())


@pytest.mark.parametrize("place", ["fashion_mnist", "FashionMNIST/raw"])
def test_fashion_mnist_has_its_own_places_and_scale(tmp_path: Path, place: str):
    contents = write_mnist(tmp_path / place)
    parts = ready(FashionMNIST(str(tmp_path), val_size=5)).parts
    images = contents["t10k-images-idx3-ubyte"].float() / 255
    assert torch.allclose(parts.test[0][:, 0], (images - 0.2860) / 0.3530, atol=1e-5)


def test_fashion_mnist_is_not_taken_from_the_root_where_mnist_may_lie(tmp_path: Path):
    write_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="FashionMNIST is in none of"):
        ready(FashionMNIST(str(tmp_path)))


def test_training_and_validation_are_the_training_file(tmp_path: Path):
    contents = write_mnist(tmp_path / "mnist")
    parts = ready(MNIST(str(tmp_path), val_size=5)).parts
    pixels = torch.cat([parts.train[0], parts.val[0]])[:, 0] * 0.3081 + 0.1307
    rows = {bytes(image.flatten().tolist()) for image in (pixels * 255).round().to(torch.uint8)}
    assert rows == {bytes(image.flatten().tolist()) for image in contents["train-images-idx3-ubyte"]}


def test_the_seed_draws_the_validation_part(tmp_path: Path):
    write_mnist(tmp_path / "mnist")
    first, again, other = (ready(MNIST(str(tmp_path), val_size=5, seed=seed)).parts for seed in (1, 1, 2))
    assert torch.equal(first.val[0], again.val[0])
    assert not torch.equal(first.val[0], other.val[0])


def test_the_variable_names_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path))
    assert MNIST().find() == tmp_path / "mnist"


@pytest.mark.parametrize(("module", "name"), [(MNIST, "train-images-idx3-ubyte"), (CIFAR10, "data_batch_1")])
def test_missing_files_are_one_error_with_every_remedy(tmp_path: Path, module: type[FileData], name: str):
    with pytest.raises(FileNotFoundError) as caught:
        ready(module(str(tmp_path)))
    for part in (str(module(str(tmp_path)).folders[0]), name, "LIGHTNING_PRUNE_DATA", "data.download=true"):
        assert part in str(caught.value)


def test_images_and_labels_of_different_sets_are_refused(tmp_path: Path):
    write_mnist(tmp_path / "mnist", gz=False)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(random_images(19, 0)[1]))
    with pytest.raises(ValueError, match="MNIST must have images"):
        ready(MNIST(str(tmp_path), val_size=5))


def test_labels_above_nine_are_refused(tmp_path: Path):
    write_mnist(tmp_path / "mnist", gz=False)
    labels = torch.full((20,), 10, dtype=torch.uint8)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match="labels 0 to 9"):
        ready(MNIST(str(tmp_path), val_size=5))


def mirror_of_mnist(folder: Path) -> tuple[str, dict[str, str]]:
    write_mnist(folder)
    return folder.as_uri(), {path.name: sha256(path) for path in folder.iterdir()}


def test_missing_files_are_downloaded_when_asked(tmp_path: Path):
    mirror, checksums = mirror_of_mnist(tmp_path / "server")
    data = ready(MNIST(str(tmp_path), val_size=5, download=True, mirror=mirror, checksums=checksums))
    assert data.find() == tmp_path / "mnist"
    assert {path.name for path in (tmp_path / "mnist").iterdir()} == set(checksums)


def test_files_that_are_there_are_not_downloaded_again(tmp_path: Path):
    write_mnist(tmp_path / "mnist")
    nowhere = (tmp_path / "gone").as_uri()
    assert len(ready(MNIST(str(tmp_path), val_size=5, download=True, mirror=nowhere)).parts.test[1]) == 6


def test_only_the_missing_file_is_downloaded(tmp_path: Path):
    mirror, checksums = mirror_of_mnist(tmp_path / "server")
    shutil.copytree(tmp_path / "server", tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "server" / "train-images-idx3-ubyte.gz").unlink()
    MNIST(str(tmp_path), download=True, mirror=mirror, checksums=checksums).prepare_data()
    assert (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").exists()


def test_another_file_than_the_public_one_is_refused_without_its_checksum(tmp_path: Path):
    mirror, _ = mirror_of_mnist(tmp_path / "server")
    with pytest.raises(ValueError, match="must have the SHA-256"):
        MNIST(str(tmp_path), download=True, mirror=mirror).prepare_data()
    assert list((tmp_path / "mnist").iterdir()) == []


def test_nothing_is_downloaded_unasked(tmp_path: Path):
    mirror, checksums = mirror_of_mnist(tmp_path / "server")
    MNIST(str(tmp_path), mirror=mirror, checksums=checksums).prepare_data()
    assert not (tmp_path / "mnist").exists()


@pytest.mark.parametrize("module", [MNIST, FashionMNIST, CIFAR10])
def test_every_public_file_has_a_sha256_and_a_mirror(module: type[FileData]):
    data = module()
    for name, checksum in data.known.items():
        assert len(bytes.fromhex(checksum)) == 32
        assert data.urls(name)
        assert all(url.startswith("http") and url.endswith(f"/{name}") for url in data.urls(name))


def test_a_checksum_of_an_unknown_file_is_refused():
    with pytest.raises(ValueError, match=r"`checksums` must name files among .*, got other.gz"):
        MNIST(checksums={"other.gz": "0" * 64})


@pytest.mark.parametrize(("argument", "value"), [("val_size", 0), ("download", "yes"), ("augment", 1)])
def test_an_argument_out_of_range_is_refused(argument: str, value: object):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        CIFAR10(**{argument: value})


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar10_joins_its_five_batches(tmp_path: Path, place: str):
    contents = write_cifar(tmp_path / place)
    parts = ready(CIFAR10(str(tmp_path), val_size=10)).parts
    assert [tuple(x.shape) for x, _ in parts] == [(30, 3, 32, 32), (10, 3, 32, 32), (8, 3, 32, 32)]
    images, labels = contents["test_batch"]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (images.reshape(8, 3, 1024) / 255 - mean[:, None]) / std[:, None]
    assert torch.allclose(parts.test[0].flatten(2), expected, atol=1e-5)
    assert torch.equal(parts.test[1], labels.long())


def test_cifar10_refuses_a_label_above_nine(tmp_path: Path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    bad = cifar_bytes(random_images(2, 0, 3072)[0], torch.tensor([3, 10]))
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(bad)
    with pytest.raises(ValueError, match="data_batch_3` must have labels 0 to 9, got 3 to 10"):
        ready(CIFAR10(str(tmp_path), val_size=5))


def test_the_archive_of_cifar10_is_downloaded_and_unpacked(tmp_path: Path):
    server = tmp_path / "server"
    write_cifar(server / "batches")
    checksum = write_cifar_archive(server / "cifar-10-python.tar.gz", server / "batches")
    checksums = {"cifar-10-python.tar.gz": checksum}
    data = CIFAR10(str(tmp_path / "root"), val_size=5, download=True, mirror=server.as_uri(), checksums=checksums)
    assert len(ready(data).parts.train[1]) == 35
    assert sorted(path.name for path in data.find().iterdir()) == sorted(CIFAR10.names)


def test_an_archive_without_a_batch_is_refused(tmp_path: Path):
    server = tmp_path / "server"
    write_cifar(server / "batches")
    (server / "batches" / "test_batch").unlink()
    checksum = write_cifar_archive(server / "cifar-10-python.tar.gz", server / "batches")
    checksums = {"cifar-10-python.tar.gz": checksum}
    data = CIFAR10(str(tmp_path / "root"), download=True, mirror=server.as_uri(), checksums=checksums)
    with pytest.raises(ValueError, match="must hold test_batch as a regular file"):
        data.prepare_data()


def test_only_training_batches_are_augmented(tmp_path: Path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    data = ready(CIFAR10(str(tmp_path), val_size=5))
    assert data.train_dataloader().collate_fn is augmented_batch
    assert data.val_dataloader().collate_fn is not augmented_batch
    plain = ready(CIFAR10(str(tmp_path), val_size=5, augment=False))
    assert plain.train_dataloader().collate_fn is not augmented_batch


def test_every_augmented_image_is_a_shifted_window_of_the_padded_one_or_its_mirror_image():
    images = torch.randn(12, 2, 6, 5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for _ in range(20):
        for index, out in enumerate(crop_and_flip(images, padding=2)):
            matches = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.equal(out.flip(-1) if mirrored else out, padded[index, :, top : top + 6, left : left + 5])
            ]
            assert len(matches) == 1
            seen.update(matches)
    # 240 draws of 50 equally likely windows: each shift along an axis and both directions occur
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_augmentation_follows_the_global_seed_and_keeps_the_classes():
    samples = [(torch.randn(3, 8, 8), torch.tensor(index)) for index in range(4)]
    torch.manual_seed(3)
    first = augmented_batch(samples)
    torch.manual_seed(3)
    again = augmented_batch(samples)
    assert torch.equal(first[0], again[0])
    assert first[1].tolist() == [0, 1, 2, 3]


MNIST_FOLDER = files.find_folder(MNIST().folders, MNIST.names) if os.environ.get(files.VARIABLE) else None


@pytest.mark.skipif(MNIST_FOLDER is None, reason="needs MNIST in the folder named by LIGHTNING_PRUNE_DATA")
def test_the_real_mnist_has_its_known_sizes_and_the_scale_of_its_constants():
    parts = ready(MNIST()).parts
    assert [len(y) for _, y in parts] == [55_000, 5_000, 10_000]
    training = torch.cat([parts.train[0], parts.val[0]])
    assert training.mean().item() == pytest.approx(0, abs=1e-3)
    assert training.std().item() == pytest.approx(1, abs=1e-3)
    assert set(parts.test[1].tolist()) == set(range(10))
