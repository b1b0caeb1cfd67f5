"""Settings: config files, arguments and their errors, in this process and as users meet them."""

import contextlib
import io
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError, check, choose, configure, user_errors

SCRIPT = '''"""A script with one setting of each kind."""

count = 3  # how many
rate = 0.5  # how fast
name = "x"  # any text, # included
flag = False  # on or off
maybe: bool | None = None  # on, off, or chosen
limit: int | None = 7
ratio: float | None = None
label: str | None = None  # text or nothing
_private = 1
listed = [1, 2]
'''
NAMES = ["count", "rate", "name", "flag", "maybe", "limit", "ratio", "label"]
SCRIPTS = ["train.py", "sample.py", "bench.py",
           *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("data/*/prepare.py"))]

# The kind of file that people have from the widely used minimal trainer.
NANOGPT_CONFIG = '''
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model

# only save checkpoints if the validation loss improves
always_save_checkpoint = False

# the number of examples per iter:
# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens/iter
batch_size = 1
gradient_accumulation_steps = 8 * 4
max_iters = 6e5
weight_decay = 1e-1
dropout = 0

# finetune at constant LR
learning_rate = 3e-5
decay_lr = False
device = 'cpu'
compile = False # do not torch compile the model
'''

RELIED_ON = {
    "train.py": "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint "
                "init_from wandb_log wandb_project wandb_run_name dataset batch_size block_size "
                "gradient_accumulation_steps n_layer n_head n_embd dropout bias learning_rate "
                "max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters "
                "lr_decay_iters min_lr backend device dtype compile",
    "sample.py": "init_from out_dir start num_samples max_new_tokens temperature top_k seed device "
                 "dtype compile",
    "bench.py": "batch_size block_size bias real_data seed device dtype compile profile",
}


@pytest.fixture(autouse=True)
def hook_restored(monkeypatch):
    """`configure` sets sys.excepthook; put it back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The path of SCRIPT as a file."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def new(script):
    """Globals of SCRIPT, as they stand when it calls `configure(globals())`."""
    namespace = {"__file__": str(script), "__name__": "__main__", "__annotations__": {}}
    exec(SCRIPT, namespace)
    return namespace


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path as an argument."""
    def write(text: str, name: str = "config.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


def error_of(namespace: dict, *argv: str) -> str:
    """The error that arguments end in; no setting has changed by then."""
    before = dict(namespace)
    with pytest.raises(UserError) as caught:
        configure(namespace, list(argv))
    assert {name: namespace[name] for name in NAMES} == {name: before[name] for name in NAMES}
    return str(caught.value)


# ------------------------------------------------------------------------------- what is set, when

def test_config_files_may_name_the_settings_of_another_script(new, write, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import os\nlearning_rate = 1e-3  # of theirs\nwidth: int | None = None\n")
    file = write("count = 4\nlearning_rate = 3\nwidth = 5")
    config, given = configure(new, [file], others=other)
    assert given == {"count": 4} and "learning_rate" not in config
    assert "'learning_rat' does not exist" in error_of(
        new, write("learning_rat = 3", "typo.py"))
    for argument in (file, "--learning_rate=3"):  # without `others`, or as an argument
        with pytest.raises(UserError, match="'learning_rate' does not exist"):
            configure(new, [argument], **({} if argument == file else {"others": other}))


def test_without_arguments_settings_keep_their_defaults(new, capsys):
    config, given = configure(new, [])
    assert config == {"count": 3, "rate": 0.5, "name": "x", "flag": False, "maybe": None,
                      "limit": 7, "ratio": None, "label": None}
    assert given == {}
    assert capsys.readouterr().out == ""


def test_an_argument_wins_over_a_config_file_wherever_it_stands(new, write):
    configure(new, ["--count=5", write("count = 4\nrate = 2.5")])
    assert (new["count"], new["rate"]) == (5, 2.5)


def test_of_two_config_files_the_later_wins(new, write):
    configure(new, [write("count = 4\nname = 'a'", "a.py"), write("count = 9", "b.py")])
    assert (new["count"], new["name"]) == (9, "a")


def test_of_two_arguments_the_later_wins(new):
    configure(new, ["--count=5", "--count=6"])
    assert new["count"] == 6


def test_a_config_file_sees_the_defaults(new, write):
    configure(new, [write("count = 2 * count\nrate += 1")])
    assert (new["count"], new["rate"]) == (6, 1.5)


def test_a_config_file_sees_what_an_earlier_one_set(new, write):
    configure(new, [write("count = 10", "a.py"), write("count = 2 * count", "b.py")])
    assert new["count"] == 20


def test_the_returned_config_has_every_setting_and_given_only_the_named(new, write):
    config, given = configure(new, [write("count = 4"), "--name=y"])
    assert given == {"count": 4, "name": "y"}
    assert config == {name: new[name] for name in NAMES}


def test_a_setting_given_its_default_again_counts_as_given(new, write, capsys):
    _, given = configure(new, [write("count = 3"), "--flag=False"])
    assert given == {"count": 3, "flag": False}
    assert capsys.readouterr().out == ""


def test_settings_that_differ_from_the_defaults_are_printed(new, capsys):
    configure(new, ["--count=4", "--name=a b", "--rate=0.5"])
    assert capsys.readouterr().out == "settings: count=4 name='a b'\n"


def test_only_the_first_of_many_processes_prints_the_settings(new, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    configure(new, ["--count=4"])
    assert capsys.readouterr().out == ""


def test_sys_argv_is_read_without_the_name_of_the_program(new, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--count=4"])
    configure(new)
    assert new["count"] == 4


def test_config_files_may_import_modules_and_define_functions(new, write):
    configure(new, [write("import math, time\ndef f(x):\n    return x + count\n"
                          "class Kept: pass\n_scratch = [1]\ncount = f(math.floor(2.5))")])
    assert new["count"] == 5


# ------------------------------------------------------------------------------------------ types

@pytest.mark.parametrize(("text", "name", "value"), [
    ("--count=-12", "count", -12),
    ("--count=6e5", "count", 600000),
    ("--rate=2", "rate", 2.0),
    ("--rate=1e-4", "rate", 1e-4),
    ("--name=123", "name", "123"),
    ("--name=a=b", "name", "a=b"),
    ("--name=", "name", ""),
    ("--name=True", "name", "True"),
    ("--name=None", "name", "None"),
    ("--name=--count=4", "name", "--count=4"),
    ("--name=\n é 日本", "name", "\n é 日本"),
    ("--label=7", "label", "7"),
    ("--label=None", "label", None),
    ("--flag=True", "flag", True),
    ("--flag=true", "flag", True),
    ("--flag=1", "flag", True),
    ("--maybe=False", "maybe", False),
    ("--maybe=false", "maybe", False),
    ("--maybe=0", "maybe", False),
    ("--maybe=None", "maybe", None),
    ("--limit=None", "limit", None),
    ("--limit=12", "limit", 12),
    ("--ratio=3", "ratio", 3.0),
])
def test_arguments_become_values_of_the_settings_type(new, text, name, value):
    configure(new, [text])
    assert new[name] == value
    assert type(new[name]) is type(value)


@pytest.mark.parametrize(("text", "name", "value"), [
    ("count = 6e5", "count", 600000),
    ("rate = 2", "rate", 2.0),
    ("ratio = 2", "ratio", 2.0),
    ("flag = 1", "flag", True),
    ("maybe = 0", "maybe", False),
    ("maybe = True", "maybe", True),
    ("limit = None", "limit", None),
    ("limit = 2.0", "limit", 2),
    ("label = None", "label", None),
    ("name = ''", "name", ""),
])
def test_values_of_a_config_file_become_the_settings_type(new, write, text, name, value):
    configure(new, [write(text)])
    assert new[name] == value
    assert type(new[name]) is type(value)


@pytest.mark.parametrize(("text", "expected"), [
    ("--count=2.5", "a whole number"),
    ("--count=abc", "a whole number"),
    ("--count=", "a whole number"),
    ("--count=True", "a whole number"),
    ("--count=None", "a whole number"),
    ("--count=inf", "a whole number"),
    ("--count=nan", "a whole number"),
    ("--rate=fast", "a finite number"),
    ("--rate=True", "a finite number"),
    ("--rate=None", "a finite number"),
    ("--rate=inf", "a finite number"),
    ("--rate=-inf", "a finite number"),
    ("--rate=nan", "a finite number"),
    ("--rate=1e999", "a finite number"),
    ("--rate=" + 400 * "9", "a finite number"),
    ("--rate=" + 5000 * "9", "a finite number"),
    ("--ratio=nan", "a finite number or None"),
    ("--flag=2", "True or False"),
    ("--flag=yes", "True or False"),
    ("--flag=None", "True or False"),
    ("--maybe=1.5", "True or False or None"),
    ("--limit=1.5", "a whole number or None"),
])
def test_an_argument_of_a_wrong_type_says_what_was_expected(new, text, expected):
    name = text[2:].partition("=")[0]
    assert re.fullmatch(rf"{name} = .* is (int|float|str): expected {expected}",
                        error_of(new, text))


@pytest.mark.parametrize(("text", "got", "expected"), [
    ("count = 2.5", "2.5 is float", "a whole number"),
    ("count = '4'", "'4' is str", "a whole number"),
    ("count = True", "True is bool", "a whole number"),
    ("count = None", "None is NoneType", "a whole number"),
    ("count = float('inf')", "inf is float", "a whole number"),
    ("count = [4]", "[4] is list", "a whole number"),
    ("rate = True", "True is bool", "a finite number"),
    ("rate = '0.5'", "'0.5' is str", "a finite number"),
    ("rate = float('nan')", "nan is float", "a finite number"),
    ("name = 123", "123 is int", "text"),
    ("name = None", "None is NoneType", "text"),
    ("flag = 2", "2 is int", "True or False"),
    ("flag = 'True'", "'True' is str", "True or False"),
    ("flag = 1.0", "1.0 is float", "True or False"),
    ("label = 5", "5 is int", "text or None"),
])
def test_a_config_value_of_a_wrong_type_says_what_was_expected_and_got(
        new, write, text, got, expected):
    name = text.split()[0]
    assert error_of(new, write(text)).endswith(f"{name} = {got}: expected {expected}")


def test_a_config_value_that_is_a_type_or_a_function_is_a_wrong_type(new, write):
    assert "expected a finite number" in error_of(new, write("rate = float"))


def test_a_number_too_long_to_be_printed_is_a_wrong_type(new, write):
    assert "expected a whole number" in error_of(new, write("count = 10**5000"))


# -------------------------------------------------------------------------------- mistakes, named

@pytest.mark.parametrize("wrong", ["--conut=4", "--counts=4", "--Count=4"])
def test_an_unknown_argument_is_refused_with_the_nearest_name(new, wrong):
    message = error_of(new, wrong)
    assert repr(wrong[2:-2]) in message
    assert "did you mean count?" in message


def test_a_name_with_dashes_is_answered_with_the_one_with_underscores():
    namespace = {"top_k": 3, "topk": 4, "__file__": __file__}
    with pytest.raises(UserError, match=r"did you mean top_k\?"):
        configure(namespace, ["--top-k=3"])


def test_an_unknown_name_in_a_config_file_is_refused_with_the_file_and_the_nearest_name(
        new, write):
    path = write("rate = 1.0\nconut = 4")
    message = error_of(new, path)
    assert path in message
    assert "'conut' does not exist (did you mean count?)" in message


@pytest.mark.parametrize("wrong", ["--_private=4", "--listed=4", "--__doc__=x", "--__file__=x"])
def test_what_is_no_setting_can_not_be_set(new, wrong):
    assert "does not exist" in error_of(new, wrong)


def test_a_setting_without_a_value_says_how_to_write_one(new):
    assert error_of(new, "--count") == "--count has no value: write --count=3"


def test_a_missing_config_file_is_named(new):
    assert "no config file 'config/nothing.py'" in error_of(new, "config/nothing.py")


def test_a_missing_dash_is_answered_with_how_to_write_arguments(new):
    assert "no config file '-count=4': arguments are config files and --key=value" \
        in error_of(new, "-count=4")


def test_an_argument_too_long_for_a_file_name_is_no_config_file(new):
    assert "no config file" in error_of(new, 300 * "a")


def test_a_folder_is_no_config_file(new, tmp_path):
    assert f"cannot read config file {tmp_path}" in error_of(new, str(tmp_path))


@pytest.mark.parametrize(("text", "kind"), [
    ("count = = 4", "SyntaxError"),
    ("count = 1 / 0", "ZeroDivisionError: division by zero"),
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("count = batch", "NameError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("assert False, 'two\\nlines'", "AssertionError: two lines"),
    ("count = 4\0", ""),
])
def test_a_config_file_that_fails_is_named_with_its_error_in_one_line(new, write, text, kind):
    path = write(text)
    message = error_of(new, path)
    assert message.startswith(f"config file {path} failed with {kind}")
    assert "\n" not in message


def test_check_names_the_values_and_the_rule_that_fails():
    with pytest.raises(UserError) as caught:
        check({"warmup": 9, "decay": 5, "rate": 1.0}, "rate > 0", "warmup < decay")
    assert str(caught.value) == "decay = 5, warmup = 9: expected warmup < decay"


def test_check_lets_values_pass_for_which_all_rules_hold():
    assert check({"top_k": None, "dropout": 0.0}, "top_k is None or top_k > 0",
                 "0 <= dropout < 1") is None


def test_choose_returns_one_of_the_choices():
    assert choose("activation", "relu", ["gelu", "relu"]) == "relu"


def test_choose_lists_the_choices_with_the_nearest():
    with pytest.raises(UserError) as caught:
        choose("activation", "rellu", ["gelu", "relu", "silu"])
    assert str(caught.value) == ("activation = 'rellu': expected one of gelu, relu, silu "
                                 "(did you mean relu?)")


def test_user_errors_keeps_the_sentence_of_a_value_error():
    with pytest.raises(UserError, match="^n_embd does not divide$"), user_errors():
        raise ValueError("n_embd does not divide")


PRINTABLE = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=40)
VALUES = st.one_of(PRINTABLE, st.floats().map(str), st.integers().map(str), st.booleans().map(str))
# What train.py does before it reads its arguments: settings as users have them.
TRAIN = (ROOT / "train.py").read_text(encoding="utf-8").partition("\nconfig, given")[0]


def arguments_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    """Any printable words, some of them with the names of settings, some with sensible values."""
    return st.lists(st.one_of(
        PRINTABLE, PRINTABLE.map("--{}".format), st.sampled_from(["--help", "-h", "--", "-", ""]),
        st.tuples(st.sampled_from(names) | PRINTABLE, VALUES).map("--{0[0]}={0[1]}".format)),
        max_size=4)


def configure_or_refuse(text: str, path: Path, argv: list[str]) -> None:
    """See a script take any arguments, or end in its own error or help."""
    namespace = {"__file__": str(path), "__annotations__": {}}
    exec(text, namespace)
    kinds = {name: typing.get_args(kind) for name, kind in namespace["__annotations__"].items()}
    before = dict(namespace)
    hook = sys.excepthook
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config, _ = configure(namespace, argv)
        for name, value in config.items():
            assert type(value) in kinds.get(name, (type(before[name]),))
            assert namespace[name] == value
    except UserError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code == 0
        assert "--help" in argv or "-h" in argv
    finally:
        sys.excepthook = hook


@settings(max_examples=300, deadline=None)
@given(arguments_of(NAMES))
def test_any_arguments_configure_or_end_in_a_user_error(script, argv):
    configure_or_refuse(SCRIPT, script, argv)


@settings(max_examples=300, deadline=None)
@given(arguments_of(RELIED_ON["train.py"].split()))
def test_any_arguments_configure_train_py_or_end_in_a_user_error(argv):
    configure_or_refuse(TRAIN, ROOT / "train.py", argv)


# ------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--count=4", "--help"], ["--oops", "-h"]])
def test_help_prints_the_docstring_and_each_setting_with_default_and_comment(new, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(new, argv)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A script with one setting of each kind."
    found = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert found == [
        ["--count=3", "# how many"], ["--rate=0.5", "# how fast"],
        ["--name='x'", "# any text, # included"], ["--flag=False", "# on or off"],
        ["--maybe=None", "# on, off, or chosen"], ["--limit=7"], ["--ratio=None"],
        ["--label=None", "# text or nothing"]]


def settings_in(text: str) -> dict[str, str]:
    """Names and trailing comments of the settings in a script's text, found line by line."""
    before, _, _ = text.partition("configure(globals()")
    found = re.findall(r"^([a-z]\w*)(?:: [^=\n]+)? = [^\n]*?(?:  # ([^\n]*))?$", before, re.M)
    return dict(found)


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_of_every_script_prints_each_setting_with_its_comment(path):
    done = run(ROOT / path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = dict(re.findall(r"^  --(\w+)=(.*)$", done.stdout, re.M))
    expected = settings_in((ROOT / path).read_text(encoding="utf-8"))
    assert expected.keys() <= shown.keys()
    assert [name for name, comment in expected.items() if not shown[name].endswith(comment)] == []


@pytest.mark.parametrize("path", RELIED_ON)
def test_scripts_have_the_settings_that_users_rely_on(path):
    shown = re.findall(r"^  --(\w+)=", run(ROOT / path, "--help").stdout, re.M)
    assert set(RELIED_ON[path].split()) - set(shown) == set()


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_help_of_the_shakespeare_sets_says_what_their_url_is(name):
    shown = run(ROOT / "data" / name / "prepare.py", "--help").stdout
    assert re.search(r"--url='https://\S+' +# where input.txt comes from", shown)


def test_a_constant_that_help_does_not_list_is_no_setting():
    done = run(ROOT / "data/openwebtext/prepare.py", "--END_OF_TEXT=x", "--input=nothing.txt")
    assert "'END_OF_TEXT' does not exist" in done.stderr


# ---------------------------------------------------------------------------- scripts as users run

@pytest.fixture(scope="module")
def nothing_heavy(tmp_path_factory):
    """A folder of modules that fail when they are imported, to stand first on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("modules")
    for name in ("torch", "tiktoken", "datasets", "pyarrow", "transformers", "wandb", "requests"):
        (folder / f"{name}.py").write_text("raise RuntimeError(f'{__name__} is heavy')\n")
    return folder


@pytest.mark.parametrize("argument", ["--nope=1", "config/nope.py"])
@pytest.mark.parametrize("path", SCRIPTS)
def test_a_mistake_is_one_line_and_status_2_before_anything_heavy_is_imported(
        path, argument, nothing_heavy):
    done = run(ROOT / path, argument, PYTHONPATH=str(nothing_heavy))
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*nope[^\n]*\n", done.stderr)
    assert done.stdout == ""


def test_a_value_out_of_range_is_one_line_and_status_2_before_torch_is_imported(nothing_heavy):
    done = run(ROOT / "train.py", "--dropout=1", PYTHONPATH=str(nothing_heavy))
    assert done.returncode == 2
    assert done.stderr == "error: dropout = 1.0: expected 0 <= dropout < 1\n"


def test_a_bug_of_ours_still_ends_in_a_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from configurator import configure\nconfigure(globals())\n1 / 0\n")
    done = run(script, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


# From here on --log_interval=0, refused when all has been read, ends train.py before it trains.

def test_a_config_file_of_nanogpt_runs_unchanged(write):
    done = run(ROOT / "train.py", write(NANOGPT_CONFIG), "--log_interval=0")
    assert done.stderr == "error: log_interval = 0: expected log_interval >= 1\n"
    for changed in ("init_from='gpt2-xl'", "always_save_checkpoint=False", "compile=False",
                    "gradient_accumulation_steps=32", "device='cpu'"):
        assert changed in done.stdout
    assert re.search(r"wandb_run_name='ft-\d+\.\d+'", done.stdout)
    assert "max_iters" not in done.stdout  # 6e5 is the default


@pytest.mark.parametrize("config", sorted(path.name for path in ROOT.glob("config/*.py")))
def test_every_config_of_the_project_is_accepted(config):
    done = run(ROOT / "train.py", f"config/{config}", "--log_interval=0")
    assert done.stderr == "error: log_interval = 0: expected log_interval >= 1\n"


def test_from_another_folder_a_config_is_found_beside_the_script(tmp_path):
    done = run(ROOT / "train.py", "config/finetune_shakespeare.py", "--log_interval=0",
               cwd=tmp_path)
    assert "dataset='shakespeare'" in done.stdout
    assert done.stderr.startswith("error: log_interval = 0")


def test_a_config_in_the_current_folder_goes_before_one_beside_the_script(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/finetune_shakespeare.py").write_text("dataset = 'mine'\n")
    done = run(ROOT / "train.py", "config/finetune_shakespeare.py", "--log_interval=0",
               cwd=tmp_path)
    assert "settings: dataset='mine' log_interval=0\n" in done.stdout


# --------------------------------------------------------------------------- the end of a script

def write_script(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text("\n".join(["import sys", f"sys.path.insert(0, {str(ROOT)!r})",
                               "from configurator import configure", "configure(globals())",
                               *lines]))
    return path


def test_a_missing_package_is_named_with_how_to_get_it(tmp_path):
    done = run(write_script(tmp_path, "import no_such_package"))
    assert done.returncode == 2
    assert done.stderr == ("error: this needs the package no_such_package: "
                           "pip install -r requirements.txt\n")


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
    script = write_script(tmp_path, "print(name)")
    script.write_text("name = 'x'\n" + script.read_text())
    done = run(script, "--name=caf\xe9", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "settings: name='caf\\xe9'\ncaf\\xe9\n"


@pytest.mark.parametrize("line, words", [
    ("bytearray(10**18)", "error: out of memory (MemoryError): choose smaller sizes"),
    ("import numpy; numpy.empty(10**17)", "Unable to allocate 711. PiB"),
    ("import torch; torch.empty(10**17)", "you tried to allocate 400000000000000000 bytes"),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\\nSee')", "2 GiB. See)"),
])
def test_too_little_memory_is_told_in_one_line_with_what_to_do(tmp_path, line, words):
    done = run(write_script(tmp_path, line))
    assert done.returncode == 2
    assert words in done.stderr and "batch_size" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(tmp_path):
    done = run(write_script(tmp_path, "1 / 0"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = write_script(tmp_path, "for i in range(100000): print(i)")
    done = subprocess.run(f"{sys.executable} {path} | head -1", shell=True, text=True,
                          capture_output=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
