"""Reading IDX files and CIFAR's pickles, finding files, downloading them."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.recipes import files

from .samples import cifar_bytes, idx_bytes, random_images, sha256

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_is_read_in_its_own_shape(tmp_path: Path, suffix: str):
    path = tmp_path / f"images{suffix}"
    content = b"\0\0\x08\x03" + b"\0\0\0\x02\0\0\0\x03\0\0\0\x04" + bytes(range(24))
    path.write_bytes(gzip.compress(content) if suffix else content)
    values = files.read_idx(path)
    assert values.dtype == torch.uint8
    assert torch.equal(values, IMAGES)


@pytest.mark.parametrize("magic", [b"", b"\0\0", b"\0\0\x0d\x01", b"\x01\0\x08\x01", b"\0\0\x08\0"])
def test_a_wrong_magic_number_is_refused(tmp_path: Path, magic: bytes):
    path = tmp_path / "labels"
    path.write_bytes(magic + bytes(8 if len(magic) == 4 else 0))
    with pytest.raises(ValueError, match="labels` must start as an IDX file"):
        files.read_idx(path)


def test_a_header_without_all_dimensions_is_refused(tmp_path: Path):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(IMAGES)[:10])
    with pytest.raises(ValueError, match="must name 3 dimensions, got 10 bytes"):
        files.read_idx(path)


@pytest.mark.parametrize(("change", "found"), [(lambda c: c[:-1], 23), (lambda c: c + b"\0", 25)])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, change: Any, found: int):
    path = tmp_path / "images"
    path.write_bytes(change(idx_bytes(IMAGES)))
    with pytest.raises(ValueError, match=rf"must hold 24 bytes for its shape \(2, 3, 4\), got {found}"):
        files.read_idx(path)


def cut(content: bytes) -> bytes:
    return content[:-10]


def flip_checksum(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


def damage(content: bytes) -> bytes:
    return content[:10] + b"\xff" * 4 + content[14:]


def not_gzip(content: bytes) -> bytes:
    return b"<html>not found</html>"


@pytest.mark.parametrize("change", [cut, flip_checksum, damage, not_gzip])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, change: Any):
    path = tmp_path / "images.gz"
    path.write_bytes(change(gzip.compress(idx_bytes(IMAGES))))
    with pytest.raises(ValueError, match=r"images\.gz` must be a whole gzip file"):
        files.read_idx(path)


def test_a_header_that_announces_too_much_is_refused_without_reserving_memory(tmp_path: Path):
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
    with pytest.raises(ValueError, match=r"must hold \d+ bytes for its shape .*, got 0"):
        files.read_idx(path)


def test_a_batch_written_by_python_2_is_read(tmp_path: Path):
    images, labels = random_images(5, 1, 3072)
    path = tmp_path / "data_batch_1"
    path.write_bytes(cifar_bytes(images, labels))
    read_images, read_labels = files.read_cifar_batch(path)
    assert torch.equal(read_images, images.reshape(5, 3, 32, 32))
    assert torch.equal(read_labels, labels.long())


def test_a_batch_written_by_this_python_is_read(tmp_path: Path):
    images, labels = random_images(3, 2, 3072)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": images.numpy(), b"labels": labels.tolist()}, protocol=4))
    assert torch.equal(files.read_cifar_batch(path)[0], images.reshape(3, 3, 32, 32))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_a_function_is_refused_and_nothing_runs(tmp_path: Path, protocol: int, function: Any):
    made = tmp_path / "made"
    argument = {"mkdir": str(made), "system": f"mkdir {made}"}.get(
        function.__name__, f"__import__('os').mkdir({str(made)!r})"
    )
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Call(function, argument), b"labels": []}, protocol=protocol))
    with pytest.raises(ValueError, match="is not allowed"):
        files.read_cifar_batch(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy", "load"), ("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile")],
)
def test_other_names_of_numpy_are_refused(tmp_path: Path, module: str, name: str):
    path = tmp_path / "data_batch_1"
    path.write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    with pytest.raises(ValueError, match="is not allowed"):
        files.read_cifar_batch(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": b"abc", b"labels": [1]}),
        cifar_bytes(*random_images(2, 0, 3072))[:-100],
        cifar_bytes(random_images(2, 0, 3072)[0], random_images(3, 0)[1]),
        cifar_bytes(*random_images(2, 0, 100)),
        cifar_bytes(*random_images(2, 0, 3072), dtype=b"O8"),
        cifar_bytes(*random_images(2, 0, 3072), fortran=True),
    ],
    ids=["empty", "text", "list", "no data", "no array", "cut", "labels", "width", "objects", "fortran"],
)
def test_a_batch_with_other_contents_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1` must be a batch of CIFAR-10 for Python"):
        files.read_cifar_batch(path)


def test_the_root_is_the_argument_else_the_variable_else_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", "from_variable")
    assert files.data_root("given") == Path("given")
    assert files.data_root(None) == Path("from_variable")
    monkeypatch.delenv("LIGHTNING_PRUNE_DATA")
    assert files.data_root(None) == Path("data")


def test_a_folder_counts_only_if_it_holds_every_file(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.gz").touch()
    assert files.find_folder([first, second], ["a", "b"]) is None
    (second / "b").touch()
    assert files.find_folder([first, second], ["a", "b"]) == second


def test_a_download_with_the_right_checksum_gets_its_name(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"content")
    files.download_file([source.as_uri()], target, sha256(source).upper())
    assert target.read_bytes() == b"content"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_download_with_another_checksum_leaves_nothing(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"content")
    with pytest.raises(ValueError, match=f"must have the SHA-256 {'0' * 64}, got {sha256(source)}"):
        files.download_file([source.as_uri()], target, "0" * 64)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("missing", [None, ""])
def test_an_unchecked_download_is_refused_before_anything_happens(tmp_path: Path, missing: str | None):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"content")
    with pytest.raises(ValueError, match="`checksums` must hold the SHA-256 of target"):
        files.download_file([source.as_uri()], target, missing)
    assert not target.parent.exists()


def test_the_second_mirror_serves_when_the_first_does_not(tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    mirrors = [(tmp_path / "gone").as_uri(), source.as_uri()]
    files.download_file(mirrors, tmp_path / "target", sha256(source))
    assert (tmp_path / "target").read_bytes() == b"content"


def test_no_mirror_is_one_error_that_names_the_folder(tmp_path: Path):
    target = tmp_path / "new" / "target"
    with pytest.raises(ConnectionError, match=r"target could not be downloaded .*gone.*Put it into .*new yourself"):
        files.download_file([(tmp_path / "gone").as_uri()], target, "0" * 64)
    assert list(target.parent.iterdir()) == []


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "target"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with files.replacing(target) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
