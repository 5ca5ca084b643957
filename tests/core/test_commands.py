"""How commands end: one line and a status."""

import errno
import functools
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import medalign_jax
from medalign_jax import cli
from medalign_jax.core import commands
from medalign_jax.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def ends(error: BaseException):
    def command():
        raise error

    return commands.ended(command)


def test_a_command_that_goes_well_gives_its_status():
    assert commands.ended(lambda: None) == 0
    assert commands.ended(lambda: 1) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("row 3: no report"), "row 3: no report"),
        (OSError(errno.ENOSPC, "x", "a"), "a: the disk is full; free some space and start again"),
        (OSError(errno.EROFS, "x", "a"), "a: the file system is read-only; choose another folder"),
        (FileNotFoundError(errno.ENOENT, "", "a"), "a: there is no such file or folder (any more)"),
        (FileExistsError(errno.EEXIST, "x", "a"), "a: there is a file of that name "
         "where a folder is needed; choose another"),
        (OSError(errno.ENAMETOOLONG, "x", "a"), "a: the name is too long for this file system"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a -> b: Invalid link"),
        (OSError("no number"), "no number"),
        (MemoryError(), "the computer is out of memory; lower train.batch_size, raise "
         "train.accumulate, or take a smaller model"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), "the device is out "
         "of memory; lower train.batch_size, raise train.accumulate, or take a smaller model"),
        (ValueError('Error writing "/x/y": No space left on device [OS error 28: ENOSPC]'),
         "/x/y: the disk is full; free some space and start again"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(capsys, error, line):
    assert ends(error) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_name_that_the_terminal_cannot_show_is_escaped():
    script = r"""import sys
from medalign_jax.core import commands
sys.exit(commands.ended(lambda: print("souffl\udce9 \u2192")))"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, capture_output=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, rb"souffl\udce9 \u2192" + b"\n"), done.stderr


def test_what_is_a_fault_of_the_code_is_raised():
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())
    with pytest.raises(ValueError, match="no system"):
        ends(ValueError("no system in it"))


def test_more_is_said_after_a_user_error_only():
    seen = []
    error = UserError("row 3")

    def command():
        raise error

    assert commands.ended(command, seen.append) == 1 and seen == [error]


def test_what_goes_wrong_while_more_is_said_is_a_line_too(capsys):
    def command():
        raise UserError("row 3")

    def told(_):
        raise OSError(errno.ENOSPC, "x", "list.jsonl")

    assert commands.ended(command, told) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: row 3" and second.startswith("error: list.jsonl: the disk is full")


def test_a_stop_says_how_to_go_on(capsys):
    assert ends(KeyboardInterrupt()) == 130
    assert ends(KeyboardInterrupt("saved step 3; start again to go on")) == 130
    first, second = capsys.readouterr().out.splitlines()
    assert first == "stopped: start the same command again to go on"
    assert second == "stopped: saved step 3; start again to go on"


def test_sigterm_ends_with_a_word_and_its_own_status(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert commands.ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().out == "stopped: start the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def interruptible():
    """A shell starts what is to run in the background with Ctrl-C ignored, and so do tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stays_ignored_in_the_background(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert commands.ended(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_garbage_collection_is_not_lost(number, capfd, interruptible):
    """Python drops what is raised in a callback of the collector, and JAX has one."""

    def during(phase, info):
        if phase == "start":
            try:
                signal.raise_signal(number)
                for _ in range(1000):  # the interpreter looks for signals where it jumps back
                    pass
            finally:
                gc.callbacks.remove(during)

    def collect():
        gc.callbacks.append(during)
        gc.collect()
        time.sleep(10)

    began = time.monotonic()
    assert commands.ended(collect) == 128 + number
    assert time.monotonic() - began < 5
    assert "ignored" not in capfd.readouterr().err


def test_a_signal_in_a_finaliser_is_not_lost(interruptible, capfd):
    class Last:
        def __del__(self):
            self.close()

        def close(self):
            signal.raise_signal(signal.SIGINT)
            for _ in range(1000):
                pass

    def drop():
        last = Last()
        del last
        time.sleep(10)

    began = time.monotonic()
    assert commands.ended(drop) == 130 and time.monotonic() - began < 5
    assert "ignored" not in capfd.readouterr().err


def test_a_signal_during_an_import_waits_for_its_end(monkeypatch, tmp_path, capsys, interruptible):
    (tmp_path / "slow_to_import.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nDONE = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def command():
        importlib.import_module("slow_to_import")
        time.sleep(10)

    assert commands.ended(command) == 130
    assert sys.modules.pop("slow_to_import").DONE
    assert capsys.readouterr().out.startswith("stopped: ")


def test_nobody_reading_on_is_not_an_error():
    code = (
        "import sys; from medalign_jax.core import commands\n"
        "def talk():\n    for _ in range(100000): print('x' * 80)\n"
        "sys.exit(commands.ended(talk))"
    )
    talk = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    talk.stdout.read(10)
    talk.stdout.close()
    assert talk.stderr.read() == b""
    assert talk.wait(60) == 1
    talk.stderr.close()


def test_an_option_given_twice_is_refused(capsys):
    parser = commands.ArgumentParser()
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--out")
    for _ in range(2):
        assert parser.parse_args(["--tasks", "a", "b", "--out", "x"]).tasks == ["a", "b"]
    for twice in (["--tasks", "a", "--tasks", "b"], ["--out", "x", "--out=y"]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(twice)
        assert ended.value.code == 2
        assert f"{twice[0]} is given twice" in capsys.readouterr().err


def test_every_module_that_can_be_run_is_a_command(capsys):
    package = ROOT / "medalign_jax"
    ended = 'if __name__ == "__main__":'
    doors = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__main__")
        for path in package.rglob("*.py")
        if ended in path.read_text(encoding="utf-8")
    } - {"__main__"}
    assert doors == {*cli.COMMANDS} - {"train"} | {"main"}
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "  medalign evaluate " in capsys.readouterr().out
    assert cli.main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"medalign_jax {medalign_jax.__version__}\n"


def test_bash_completes_the_commands(capsys):
    assert cli.main(["--completion"]) == 0
    ask = "COMP_WORDS=(medalign ev); COMP_CWORD=1; _medalign; echo ${COMPREPLY[@]}"
    script = f"{capsys.readouterr().out}\n{ask}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("evaluate\n", "")


ARGUMENTS = {
    "convert": ["--format=icbhi", "--root=x", "--out=y"],
    "prepare": ["--manifest=x", "--out=y"],
    "simulate": ["--out=x", "--count=2"],
    "join_descriptions": ["--questions=x", "--descriptions=y", "--out=z"],
    "embed": ["--checkpoint=x", "a.wav"],
    "query": ["--checkpoint=x", "a.wav"],
    "push": ["--checkpoint=x", "--repo=a/b"],
    "app": ["--checkpoint=x"],
    "report": ["x", "--out=y.html"],
    "ask": ["--model=x", "a.wav", "--question=?"],
    "evaluate": ["--encoder=x", "--manifest=y", "--tasks=z", "--out=o"],
    "models": [],
}


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS} - {"train", "plan"}))
def test_every_command_ends_in_words(monkeypatch, name):
    """The other two have a config, and `config_command` ends them."""
    monkeypatch.setattr(commands, "ended", lambda command, *_, **__: 77)
    assert cli.main([name, *ARGUMENTS[name]]) == 77


@pytest.mark.parametrize(("name", "words"), [("train", "--workdir"), ("plan", "--topology")])
def test_commands_with_a_config_show_their_flags_and_the_configs_from_anywhere(
    tmp_path, name, words
):
    """Where no configs lie, those of the package are taken."""
    run = functools.partial(
        subprocess.run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    command = [sys.executable, "-m", "medalign_jax", name]
    assert {words, "--config=configs/acula.py"} <= {*run([*command, "--help"]).stdout.split()}
    for given in (["--config=configs/pretrain.py:demo"], ["--config", "configs/pretrain.py:demo"]):
        assert "--config.train.steps=1000" in run([*command, *given, "--help"]).stdout
