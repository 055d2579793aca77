"""Files are whole or absent."""

from __future__ import annotations

import os
import stat

import pytest

from lightning_prune.files import replacing


def test_a_new_file_appears_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "runs" / "one" / "masks.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"masks")
        assert not path.exists()
    assert path.read_bytes() == b"masks"
    assert os.listdir(path.parent) == ["masks.bin"]


def test_an_old_file_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "masks.bin"
    path.write_bytes(b"old")
    with replacing(str(path)) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "masks.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"ha")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["masks.bin"]


def test_the_temporary_file_lies_in_the_same_folder(tmp_path):
    """A rename is atomic only within one file system."""
    with replacing(tmp_path / "masks.bin") as temporary:
        assert temporary.parent == tmp_path


@pytest.mark.skipif(os.name != "posix", reason="permission bits are those of POSIX")
def test_the_file_has_the_permissions_of_the_process(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "masks.bin") as temporary:
            temporary.write_bytes(b"masks")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "masks.bin").stat().st_mode) == 0o640


def test_a_folder_in_the_way_is_an_error_that_leaves_it(tmp_path):
    folder = tmp_path / "masks.bin"
    folder.mkdir()

    def write() -> None:
        with replacing(folder) as temporary:
            temporary.write_bytes(b"masks")

    with pytest.raises(OSError, match=str(tmp_path)):
        write()
    assert os.listdir(tmp_path) == ["masks.bin"]
    assert folder.is_dir()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "runs").write_bytes(b"a file")

    def write() -> None:
        with replacing(tmp_path / "runs" / "masks.bin") as temporary:
            temporary.write_bytes(b"masks")

    with pytest.raises(OSError, match=str(tmp_path)):
        write()
    assert (tmp_path / "runs").read_bytes() == b"a file"
