"""Commands that take a config: their flags, and `--help`, which lists the config's keys.

The comments are read from the config files themselves: what stands on a key's line, or alone above
it. So a key is explained in one place.
"""

from __future__ import annotations

import ast
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from medalign_jax.core import commands
from medalign_jax.core.local_paths import check_local

_WIDTH = 100
_COMMON = "common.py"  # read first: the blocks that configs share


_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


def run(main: Callable[[], int | None], document: str) -> int:
    """Reads the flags of `sys.argv` and runs a command that has a flag `config`.

    Args:
      main: the command; flags are read when it is called.
      document: what it does, for --help.

    Returns:
      The exit status, see `commands.ended`.
    """

    def command() -> int | None:
        asked = any(argument in _HELP for argument in sys.argv[1:])
        given = [argument for argument in sys.argv[1:] if argument not in _HELP]
        rest = _read_flags([sys.argv[0], *shipped(given)])
        if asked:
            print(_help(flags.FLAGS, document, main.__module__))
            return 0
        if len(rest) > 1:
            raise commands.UsageError(
                f"unknown arguments: {' '.join(rest[1:])}; flags begin with --"
            )
        if not flags.FLAGS["config"].present:
            raise commands.UsageError(
                "name a --config, e.g. --config=configs/acula.py:demo; see --help"
            )
        _check_file(flags.FLAGS)
        _check_paths(flags.FLAGS, main.__module__)
        return main()

    return commands.ended(command)


def _check_file(values: flags.FlagValues) -> None:
    """The flag itself says so only when its value is asked for, and in words of its own."""
    name = values["config"].config_filename.partition(":")[0]
    if not Path(name).is_file():
        raise commands.UsageError(f"--config={name}: there is no such file here ({Path.cwd()})")


def _check_paths(values: flags.FlagValues, module: str) -> None:
    """Refuses places that are not local, in the flags of the command's module and in the config."""
    own = {flag.name: flag.value for flag in values.get_flags_for_module(module)}
    config = own.pop("config", None)
    check_local(own)
    if isinstance(config, ConfigDict):  # else the command says what is wrong with it
        check_local(config.to_dict(), "config")


def _read_flags(argv: list[str]) -> list[str]:
    """The arguments that are not flags, the program's name first."""
    for text in argv[1:]:  # reading the flag runs the file
        flag, _, value = text.partition("=")
        name = value.partition(":")[0]
        if flag.lstrip("-") == "config" and Path(name).is_file() and not name.endswith(".py"):
            raise commands.UsageError(
                f"--config={name} is not a config: it has to be a Python file, see --help"
            )
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A failing config file has its whole traceback in the message; the last line says it.
        raise commands.UsageError(str(error).strip().splitlines()[-1].strip()) from error
    except Exception as error:  # a config is the user's code: it may raise anything at all
        given = ", ".join(text for text in argv[1:] if text.startswith("--config"))
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(said).replace("\\n", " ").split())
        raise commands.UsageError(
            f"the config does not load or has no such key ({type(error).__name__}: {reason}); "
            f"given: {given}"
        ) from error


def _help(values: flags.FlagValues, document: str, module: str) -> str:
    """With a config its keys are listed, else the files that there are."""
    own = sorted(values.get_flags_for_module(module), key=lambda flag: flag.name)
    lines = [document.replace("``", "").strip(), ""]  # the marks of code in a docstring
    for flag in own:
        lines.append(f"--{flag.name}" + (f"={flag.default}" if flag.default else ""))
        lines += _indented(flag.help)
    path = values["config"].config_filename if values["config"].present else None
    if path is None:
        return "\n".join([*lines, "", overview(_configs())])
    return "\n".join([*lines, "", keys(values["config"].value, Path(path.partition(":")[0]))])


def shipped(arguments: Sequence[str]) -> list[str]:
    """The arguments, with a --config that is not here taken from those that come with the package.

    ``--config=configs/acula.py`` names the file of the folder one stands in, and where there is
    none, the package's own. Configs import one another as `configs.NAME`, whoever's they are.
    """
    found, home = list(arguments), _configs().parent
    for i, text in enumerate(found):
        flag, equals, value = text.partition("=")
        if not equals and i and found[i - 1].lstrip("-") == "config":
            flag, value = "--config", text
        name, colon, variant = value.partition(":")
        if flag.lstrip("-") == "config" and not Path(name).exists() and (home / name).is_file():
            found[i] = f"{flag}{equals}" * bool(equals) + f"{home / name}{colon}{variant}"
    if str(home) not in sys.path:
        sys.path.append(str(home))  # where there are other `configs`, those come first
    return found


def _configs() -> Path:
    """The folder of configs: in a checkout beside the package, else within it."""
    package = Path(__file__).resolve().parents[1]
    beside, within = package.parent / "configs", package / "shipped" / "configs"
    return within if within.is_dir() else beside


def overview(folder: Path) -> str:
    """The config files of a folder, each with the text at its head, and where to read on."""
    parts = []
    for path in sorted(folder.glob("*.py")):
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if path.name not in ("__init__.py", _COMMON) and head:
            parts.append(f"--config={folder.name}/{path.name}\n{textwrap.indent(head, '  ')}")
    parts.append("Keys of one of them, with their values: add --help to its --config=...")
    return "\n\n".join(parts)


def keys(config: ConfigDict, path: Path) -> str:
    """A line for each key of a config: its flag with its value, and what it means.

    Args:
      config: with the values to show.
      path: its file; those beside it, which it may take from, are read too.
    """
    others = sorted(path.parent.glob("*.py"))
    comments = _comments([path.parent / _COMMON, path, *others])
    lines = []
    for name, value in _leaves(config):
        shown = "" if value is None else str(value).replace("\n", "\\n")
        flag = textwrap.shorten(f"--config.{name}={shown}", _WIDTH, placeholder=" ...")
        lines.append(flag)
        lines += _indented(comments.get(_plain(name), ""))
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name in config:
        value = config.get(name)  # None of a placeholder
        if isinstance(value, ConfigDict) and len(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", {} if isinstance(value, ConfigDict) else value


def _plain(name: str) -> str:
    """Changes of the config for a stage are explained where the config is."""
    return name.partition(".changes.")[2] or name


def _comments(paths: list[Path]) -> dict[str, str]:
    """key, such as "train.epochs" -> its first comment; "" where it has none."""
    found: dict[str, str] = {}
    for path in paths:
        if path.is_file():
            source = path.read_text(encoding="utf-8")
            beside, above = _comment_lines(source)
            for key, line in _assigned(ast.parse(source)):
                comment = beside.get(line) or _block_above(above, line)
                found[key] = found.get(key) or comment
    return found


def _comment_lines(source: str) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """Comments by line: those behind code, and those that stand alone."""
    beside, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("# ").strip()
            own_line = not token.line[: token.start[1]].strip()
            if not words.startswith("fmt:"):
                (alone if own_line else beside)[token.start[0]] = words
    return beside, alone


def _block_above(alone: Mapping[int, str], line: int) -> str:
    words = []
    while (line := line - 1) in alone:
        words.insert(0, alone[line])
    return " ".join(words)


def _assigned(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Keys that a file gives a value, in its order, with their lines."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.Expr)]
    for node in sorted(nodes, key=lambda n: n.lineno):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
            if node.value.func.attr != "update":
                continue
            target, value = node.value.func.value, node.value
        else:
            continue
        names = ast.unparse(target).split(".")
        if names[0] != "config":
            continue
        block = ".".join(names[1:])
        if isinstance(node, ast.Assign):
            yield block, node.lineno
        yield from _keys_of(value, block)


def _keys_of(value: ast.expr, block: str) -> Iterator[tuple[str, int]]:
    """Of a dict, or of a call that is given one."""
    if isinstance(value, ast.Call):
        for argument in value.args:
            yield from _keys_of(argument, block)
    elif isinstance(value, ast.Dict):
        for key, inner in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant):
                name = f"{block}.{key.value}".lstrip(".")
                yield name, key.lineno
                yield from _keys_of(inner, name)
