"""The house rules: imports point down, backends stay on their floors, files and functions stay small."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("nemo_r3", "recipes", "slurm")

FLOORS = {
    f"nemo_r3.{room}": floor
    for floor, rooms in enumerate(
        (
            "types errors files imports config units visible signals progress series",
            "tasks dialogue algo watchdog trackers",
            "models precision fp8_support runtime entry memory",
            "actor rollout refit",
            "adapter assets capacity curve plan evaluate export failures html_report model_card results run_directory",
        )
    )
    for room in rooms.split()
} | {"nemo_r3": 0, "recipes": 5, "slurm": 6}
STRANGERS = [("nemo_r3.actor", "nemo_r3.rollout"), ("nemo_r3.rollout", "nemo_r3.actor")]
BACKENDS = {"megatron", "transformer_engine", "vllm"}
BACKEND_FLOORS = (2, 3)

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LONGEST_LOOP_FILE = 149  # recipes/train.py
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
UNPICKLERS = {"load", "loads", "Unpickler"}


def sources() -> list[Path]:
    return sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The package or module that has a floor: "nemo_r3.actor" for "nemo_r3.actor.policy"."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "nemo_r3" else parts[0]


def floor_of(room: str) -> int:
    assert room in FLOORS, f"{room} has no floor: give it one in FLOORS of tests/test_floors.py"
    return FLOORS[room]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import: those in functions and for type checkers count, too."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield node.lineno, inner if is_module(inner) else module


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_module_has_a_floor() -> None:
    for room in {room_of(module_of(path)) for path in sources()}:
        floor_of(room)


def test_imports_point_down() -> None:
    wrong = []
    for path in sources():
        here = room_of(module_of(path))
        for line, module in imports_of(path):
            there = room_of(module)
            if module.split(".")[0] not in TOPS or here == there:
                continue
            if floor_of(there) > floor_of(here):
                wrong.append(f"{at(path, line)}: floor {floor_of(here)} imports {module} of floor {floor_of(there)}")
            if (here, there) in STRANGERS:
                wrong.append(f"{at(path, line)}: {here} and {there} do not know each other; recipes joins them")
    assert not wrong, "\n".join(wrong)


def test_rooms_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources():
        here = room_of(module_of(path))
        rooms = {room_of(module) for _, module in imports_of(path) if module.split(".")[0] in TOPS}
        graph.setdefault(here, set()).update(rooms - {here})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " <- ".join(error.args[1]))


def test_backends_stay_on_their_floors() -> None:
    wrong = [
        f"{at(path, line)}: {module} belongs to floors {BACKEND_FLOORS}"
        for path in sources()
        for line, module in imports_of(path)
        if module.split(".")[0] in BACKENDS and floor_of(room_of(module_of(path))) not in BACKEND_FLOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    limits = {ROOT / "recipes/train.py": LONGEST_LOOP_FILE}
    wrong = [
        f"{at(path, length)}: at most {limits.get(path, LONGEST_FILE)} lines"
        for path, length in lengths.items()
        if length > limits.get(path, LONGEST_FILE)
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short() -> None:
    wrong = [
        f"{at(path, node.lineno)}: {node.name} has {length} lines, at most {LONGEST_FUNCTION}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_are_named_after_what_they_do() -> None:
    wrong = [module for module in map(module_of, sources()) if VAGUE_NAMES & set(module.split("."))]
    assert not wrong, f"{wrong}: say what it is for"


def test_nothing_is_evaluated_or_unpickled() -> None:
    wrong = [
        f"{at(path, node.lineno)}: {ast.unparse(node.func)}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and is_dangerous(node)
    ]
    wrong += [
        f"{at(path, node.lineno)}: from pickle import"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "dill")
    ]
    assert not wrong, "\n".join(wrong)


def is_dangerous(call: ast.Call) -> bool:
    """Whether a call runs text as code, or reads a pickle (which does)."""
    if isinstance(call.func, ast.Name):
        return call.func.id in ("eval", "exec")
    if not isinstance(call.func, ast.Attribute):
        return False
    owner, name = ast.unparse(call.func.value), call.func.attr
    if (owner, name) == ("torch", "load"):
        return not any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in call.keywords)
    return owner in ("pickle", "cloudpickle", "dill") and name in UNPICKLERS
