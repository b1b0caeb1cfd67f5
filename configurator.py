"""Turn config files and --key=value arguments into checked settings.

A script lists its settings as plain top-level variables, then calls `configure(globals())`:

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False

Config files are Python, run in the order given; arguments win over all of them. Only the standard
library is imported here, so a mistyped setting is answered before torch is loaded.
"""

import ast
import builtins
import difflib
import errno
import io
import os
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PLAIN_TYPES = (bool, int, float, str, types.NoneType)
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what, found, expected, what to do."""


class RunError(Exception):
    """What ends a run through no mistake that could be seen at its start, told the same way."""


def configure(settings: dict, argv: list[str] | None = None, others: Path | None = None,
              ) -> tuple[dict, dict]:
    """Override a script's settings from config files and --key=value arguments.

    settings: the script's `globals()`, changed in place. Its public lower-case variables that
        hold a bool, int, float, str or None are the settings; an annotation such as `int | None`
        widens what one accepts, otherwise the type of the default decides.
    argv: arguments without the program's name; `sys.argv[1:]` if None.
    others: a script whose settings config files may set too; those that are not ours do nothing.
    Returns (config, given): all settings by name, and those that files or arguments named,
        whether or not they differ from the default.
    Raises UserError. From here on an uncaught UserError ends the process in one line on stderr
    and exit status 2, an uncaught RunError in one line and exit status 1.
    """
    sys.excepthook = _end_in_one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of few characters shows \\xe9 for é
        sys.stdout.reconfigure(errors="backslashreplace")
    kinds = _kinds(settings)
    defaults = {name: settings[name] for name in kinds}
    given = {}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_help(settings, kinds))
        raise SystemExit(0)
    passed_over = _assignments(others) if others else {}
    for arg in argv:  # files first: an argument wins wherever it stands
        if not arg.startswith("--"):
            given |= _run_config(arg, defaults | given, kinds, passed_over)
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            _known(name, kinds, "setting")
            if not equals:
                raise UserError(f"--{name} has no value: write --{name}={defaults[name]}")
            given[name] = _parse(name, text, kinds[name])
    settings.update(given)
    changed = [f"{k}={v!r}" for k, v in given.items() if v != defaults[k]]
    if changed:
        announce("settings:", *changed)
    return defaults | given, given


def announce(*words: object) -> None:
    """Print, if this is the only process or, under torchrun, the main one."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def check(settings: dict, *rules: str) -> None:
    """Raise UserError unless every rule, a Python condition over the settings, holds.

    Example: `check(globals(), "0 <= dropout < 1", "top_k is None or top_k > 0")`.
    """
    for rule in rules:
        if not eval(rule, {}, settings):  # the rules are the script's own text, never a user's
            names = {n.id for n in ast.walk(ast.parse(rule)) if isinstance(n, ast.Name)}
            found = ", ".join(f"{n} = {settings[n]!r}" for n in sorted(names) if n in settings)
            raise UserError(f"{found}: expected {rule}")


def choose(name: str, value: str, choices: list[str]) -> str:
    """Return `value` if it is one of `choices`; else raise UserError with the choices listed."""
    if value not in choices:
        raise UserError(f"{name} = {value!r}: expected one of {', '.join(choices)}"
                        f"{_nearest(value, choices)}")
    return value


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError of the model, whose arguments come from settings, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def _kinds(settings: dict) -> dict[str, tuple[type, ...]]:
    """The types that each setting accepts, by name."""
    annotations = settings.get("__annotations__", {})
    kinds = {}
    for name, value in settings.items():
        if name.startswith("_") or name.isupper() or not isinstance(value, PLAIN_TYPES):
            continue
        annotation = annotations.get(name, type(value))
        kinds[name] = typing.get_args(annotation) or (annotation,)
    return kinds


def _run_config(arg: str, current: dict, kinds: dict, passed_over: dict) -> dict:
    """Execute one config file; return the settings of ours that it sets."""
    path = next((p for p in (Path(arg), ROOT / arg) if os.path.exists(p)), None)
    if path is None:
        raise UserError(f"no config file {arg!r}: arguments are config files and --key=value")
    # Settings are visible as builtins, so that what the file assigns stands apart from them.
    namespace = {"__builtins__": vars(builtins) | current, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config file {path} failed with {message}") from None
    found = {}
    for name, value in namespace.items():
        if name.startswith("_") or (name not in kinds and (
                name in passed_over or isinstance(value, types.ModuleType) or callable(value))):
            continue
        _known(name, kinds, f"{path}: setting")
        found[name] = _convert(name, value, kinds[name])
    return found


def _convert(name: str, value: object, kinds: tuple[type, ...]) -> object:
    """Fit a config file's value to a setting's types: int widens to float, 0 and 1 to bool."""
    if isinstance(value, (int, float)) and not -sys.float_info.max <= value <= sys.float_info.max:
        raise _wrong_type(name, value, kinds)  # inf, nan, or a whole number of 300 digits
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    if type(value) is int and bool in kinds and value in (0, 1):
        return bool(value)
    if type(value) is float and int in kinds and value.is_integer():  # max_iters = 6e5
        return int(value)
    raise _wrong_type(name, value, kinds)


def _parse(name: str, text: str, kinds: tuple[type, ...]) -> object:
    """Read the text of --name=text as one of a setting's types."""
    if text == "None" and types.NoneType in kinds:
        return None
    if str in kinds:
        return text
    if bool in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return _convert(name, kind(text), kinds)
    raise _wrong_type(name, text, kinds)


def _wrong_type(name: str, value: object, kinds: tuple[type, ...]) -> UserError:
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text",
             types.NoneType: "None"}
    expected = " or ".join(words[kind] for kind in kinds)
    try:
        found = " ".join(repr(value).split())
    except ValueError:  # a whole number of thousands of digits
        found = "a number of very many digits"
    return UserError(f"{name} = {found} is {type(value).__name__}: expected {expected}")


def _known(name: str, kinds: dict, what: str) -> None:
    if name not in kinds:
        raise UserError(f"{what} {name!r} does not exist{_nearest(name, list(kinds))}; "
                        f"--help lists the settings")


def _nearest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), choices, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _help(settings: dict, kinds: dict) -> str:
    """The script's docstring, then its settings with their defaults and comments, from its text."""
    source = Path(settings["__file__"]).read_text(encoding="utf-8")
    comments = {token.start[0]: token.string
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    rows = [f"  {f'--{name}={settings[name]!r}':<40} {comments.get(line, '')}".rstrip()
            for name, line in _assignments(settings["__file__"]).items() if name in kinds]
    return "\n".join([settings["__doc__"] or "", "Settings:", *rows])


def _assignments(path: str | Path) -> dict[str, int]:
    """The names that a script assigns before it calls `configure`, and the line of each."""
    lines = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if getattr(getattr(getattr(node, "value", None), "func", None), "id", "") == "configure":
            break
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            lines.setdefault(target.id, node.lineno)
    return lines


def _end_in_one_line(kind: type, error: BaseException, trace: types.TracebackType) -> None:
    status = 2
    if issubclass(kind, ModuleNotFoundError):
        error = f"this needs the package {error.name}: pip install -r requirements.txt"
    elif issubclass(kind, KeyboardInterrupt):
        error, status = "stopped by Ctrl-C", 130
    elif issubclass(kind, BrokenPipeError):  # the reader, such as head, has seen enough
        _discard_output()
        raise SystemExit(1)
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = f"the disk of {error.filename or 'the output'} is full: make room, and start again"
        _discard_output()
    elif issubclass(kind, MemoryError) or (issubclass(kind, RuntimeError)
                                           and "allocate" in str(error)):  # torch's, of any device
        error = (f"out of memory ({' '.join(str(error).split())[:200] or kind.__name__}): choose "
                 f"smaller sizes, such as batch_size, block_size, n_embd or num_samples")
    elif issubclass(kind, RunError):
        status = 1
    elif not issubclass(kind, UserError):  # a bug of ours keeps its traceback
        sys.__excepthook__(kind, error, trace)
        return
    with suppress(OSError):
        sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(status)


def _discard_output() -> None:
    """Send stdout nowhere, so that flushing what is left of it cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
