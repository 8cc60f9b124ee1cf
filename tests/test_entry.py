"""How a recipe's process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from nemo_r3 import entry, signals

SCRIPT = """
__doc__ = "What this recipe is for."
import atexit
import os
import signal
import sys
from pathlib import Path

from nemo_r3 import entry, signals, trackers

signal.signal(signal.SIGINT, signal.SIG_DFL)  # as recipes/__init__.py has it while modules are imported
from nemo_r3.errors import ConfigError

def recipe(arguments):
    print("said before", end="")
    if arguments == ["mend"]:
        raise ConfigError("model.path: mend me")
    if arguments == ["stop"]:
        raise signals.Stopped("stopped by SIGUSR1")
    if arguments == ["bug"]:
        raise ZeroDivisionError("a bug")
    if arguments == ["interrupt"]:
        raise KeyboardInterrupt
    if arguments == ["ctrl-c"]:
        signal.raise_signal(signal.SIGINT)
    if arguments == ["shown"]:
        trackers._open.append(Tracker())
        raise ConfigError("mend me")
    assert arguments == ["well", "x=1"]

class Tracker:
    def close(self, code):
        print("closed with", code, file=sys.stderr)

home, children = Path(sys.argv[1]), {}
ways = ["0 mend", "1 mend", "0 stop", "1 stop", "0 bug", "0 interrupt", "0 ctrl-c", "0 --help", "0 shown", "0 well x=1"]
for rank, *arguments in map(str.split, ways):
    name = f"{arguments[0]} {rank}"
    child = os.fork()  # importing torch once is enough
    if child == 0:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(home / f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
        os.environ["RANK"] = rank
        sys.argv[1:] = arguments
        atexit.register(print, "exit hook", file=sys.stderr)
        entry.main(recipe)
        sys.exit()
    children[child] = name
for child, name in children.items():
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (home / f"{name}.code").write_text(str(code))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each way to end."""
    home = tmp_path_factory.mktemp("ends")
    subprocess.run([sys.executable, "-c", SCRIPT, str(home)], timeout=300, check=True)
    return {
        file.stem: (int(file.read_text()), *(file.with_suffix(f".{end}").read_text() for end in ("out", "err")))
        for file in home.glob("*.code")
    }


STOPPED = "stopped by SIGUSR1; run the same command again: training and mining go on from what is saved\n"
ENDS = {
    "mend 0": (2, "said before", "error: model.path: mend me\n"),
    "mend 1": (2, "said before", "[rank 1] error: model.path: mend me\n"),
    "shown 0": (2, "said before", "error: mend me\nclosed with 2\n"),  # trackers are told how the process ends
    "stop 0": (signals.STOPPED, "said before", STOPPED),
    "stop 1": (signals.STOPPED, "said before", ""),
    "interrupt 0": (130, "said before", "interrupted\n"),
    "ctrl-c 0": (130, "said before", "interrupted\n"),
    "well 0": (0, "said before", "exit hook\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_says_in_one_line_and_by_its_code_how_it_ended(
    ends: dict[str, tuple[int, str, str]], end: str
) -> None:
    assert ends[end] == ENDS[end]


def test_a_bug_shows_its_traceback_and_code_1(ends: dict[str, tuple[int, str, str]]) -> None:
    code, _, errors = ends["bug 0"]
    assert code == 1
    assert errors.startswith("Traceback") and errors.rstrip().endswith("ZeroDivisionError: a bug")
    assert "exit hook" not in errors, "failures must not run vLLM's exit hooks"


def test_help_shows_a_command_and_where_the_settings_are(ends: dict[str, tuple[int, str, str]]) -> None:
    code, said, errors = ends["--help 0"]
    assert (code, errors) == (0, "exit hook\n") and "python -m recipes.train" in said and "docs/config.md" in said
    assert said.startswith("What this recipe is for.\n"), "the docstring of the recipe's module"


INTERRUPTED = """
import signal, sys
{prepare}
sys.argv[0] = "-m"  # as where Python looks for the verb
import recipes
signal.raise_signal(signal.SIGINT)
print("went on")
"""


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [("", -signal.SIGINT, ""), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", 0, "went on\n")],
)
def test_ctrl_c_while_a_verb_is_imported_ends_it_without_a_traceback(prepare: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(prepare=prepare)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "Gloo connectFullMesh failed with [/gloo/] Connection refused",
            "the ranks cannot connect to each other: set ",
        ),
        ("[/gloo/] Timed out waiting 1800000ms for recv", "a collective waited for another rank until run.timeout_min"),
        ("[/gloo/] Connection closed by peer [10.0.0.2]", "another rank has ended, which ends this one; "),
    ],
)
def test_a_failed_collective_points_at_its_cause_in_one_line(message: str, said: str) -> None:
    found = entry._of_another_rank(RuntimeError(f"{message}\nframe #0: 0x7f"))
    assert found.startswith(said) and found.endswith(f" ({message})")


def test_a_locale_without_a_tables_characters_does_not_end_a_recipe() -> None:
    code = "from nemo_r3 import entry; entry.main(lambda _: print('0.2 → 0.3'))"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"0.2 \\u2192 0.3\n")


@pytest.mark.parametrize(
    ("recipe", "output", "code", "said"),
    [
        ("print('x')", "1>&$unread", 128 + signal.SIGPIPE, ""),
        ("os.write(int(os.environ['unread']), b'x')", "", 1, "BrokenPipeError: [Errno 32] Broken pipe"),
        ("print('x')", ">&-", 0, ""),
        ("open('/dev/null/x')", "2>&$unread", 2, ""),  # an error that the user can fix
        ("open('/dev/null/x')", "2>&-", 2, ""),
    ],
)
def test_output_that_nobody_reads_ends_a_recipe_like_other_tools_and_no_other_pipe_does(
    recipe: str, output: str, code: int, said: str
) -> None:
    read, unread = os.pipe()
    os.close(read)
    command = f'"$0" -c "import os; from nemo_r3 import entry; entry.main(lambda _: {recipe})" {output}'
    told: dict[str, Any] = {"env": os.environ | {"unread": str(unread)}, "pass_fds": [unread], "capture_output": True}
    done = subprocess.run(["bash", "-c", command, sys.executable], text=True, check=False, **told)
    os.close(unread)
    assert done.returncode == code and done.stderr.rstrip().endswith(said) and bool(done.stderr) == bool(said)
