"""What the other tests take for granted of the processes that they launch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from processes import run_python

SCRIPT = """
import json, os, sys

brought = {"vllm", "megatron", "nemo_r3", "recipes"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps([sys.argv, sys.path[0], __name__, os.getcwd(), dict(os.environ), sorted(brought)]))
print("to standard error", file=sys.stderr)
sys.exit(3)
"""


def test_a_fork_finds_what_a_fresh_process_finds(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8", "OWN": "value"}
    for command in ((str(tmp_path / "script.py"), "a b"), ("-m", "script", "a b")):
        found = []
        for fresh in (False, True):
            done = run_python(*command, ranks=1, path=tmp_path, environment=environment, seconds=100, fresh=fresh)
            assert (done.returncode, done.stderr) == (3, "to standard error\n")
            found.append(json.loads(done.stdout))
        assert found[0] == found[1] and found[0][-1] == []
