"""Files that are whole or not there, and folders whose damage is noticed."""

import os
import random
import subprocess
import sys

import pytest

from medalign_jax.core import seals
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import check_no_folders, clear_remains, write_whole, writing_whole


def test_nothing_new_where_the_writer_fails(tmp_path):
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), writing_whole(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tmp_path):
    (tmp_path / "a").write_text("")
    check_no_folders(tmp_path, ("a", "b"))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b is a folder, and a file of that name will be written"):
        check_no_folders(tmp_path, ("a", "b"))


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with writing_whole(tmp_path / "a") as one, writing_whole(tmp_path / "a") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"  # the block that ended last
    assert len(list(tmp_path.iterdir())) == 1


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path):
    old = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


KILLED = """
import os, signal, sys
from pathlib import Path
from medalign_jax.core.files import writing_whole
with writing_whole(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_remains_of_the_dead_are_cleared_and_work_in_progress_stays(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    (remains,) = tmp_path.iterdir()
    with writing_whole(tmp_path / "b") as temporary:
        temporary.write_bytes(b"b")
        clear_remains(tmp_path)
        assert not remains.exists() and temporary.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def sealed(folder):
    (folder / "in").mkdir()
    rng = random.Random(0)
    for name in ("a", "in/b", "in/c"):
        (folder / name).write_bytes(rng.randbytes(50))
    seals.seal(folder)
    return folder


def test_what_is_sealed_is_what_sha256sum_checks(tmp_path):
    sealed(tmp_path)
    assert seals.check_seal(tmp_path)
    checked = subprocess.run(["sha256sum", "-c", seals.NAME], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0 and checked.stdout.count(b": OK") == 3
    (tmp_path / seals.NAME).unlink()
    assert not seals.check_seal(tmp_path)  # nobody knows


def test_every_flipped_bit_of_a_sealed_folder_is_refused(tmp_path):
    files = [p for p in sealed(tmp_path).rglob("*") if p.is_file()]
    rng = random.Random(1)
    for _ in range(60):
        path = rng.choice(files)
        content = path.read_bytes()
        changed, bit = bytearray(content), rng.randrange(8 * len(content))
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(seals.DamagedError, match="damaged"):
            seals.check_seal(tmp_path)
        path.write_bytes(content)
    assert seals.check_seal(tmp_path)


@pytest.mark.parametrize("name", ["in/\0", "in/" + "b" * 300])
def test_a_sealed_name_that_no_file_can_have_is_refused(tmp_path, name):
    sealed(tmp_path)
    text = (tmp_path / seals.NAME).read_text()
    (tmp_path / seals.NAME).write_text(text.replace("in/b", name))
    with pytest.raises(seals.DamagedError, match=r"\(missing\)"):
        seals.check_seal(tmp_path)


def test_damage_is_named_in_the_share_that_reads_it(tmp_path):
    sealed(tmp_path)
    (tmp_path / "in" / "b").unlink()
    assert seals.check_seal(tmp_path, share=(0, 3)) and seals.check_seal(tmp_path, under="a")
    with pytest.raises(seals.DamagedError, match=r"in/b \(missing\)"):
        seals.check_seal(tmp_path, share=(1, 3))


def test_a_folder_is_read_again_only_where_it_has_changed(tmp_path, monkeypatch):
    sealed(tmp_path)
    assert seals.check_seal_once(tmp_path)
    monkeypatch.setattr(seals, "_sha256", lambda path: pytest.fail("was read again"))
    assert seals.check_seal_once(tmp_path)
    monkeypatch.undo()
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(seals.DamagedError, match="a not as when written"):
        seals.check_seal_once(tmp_path)
