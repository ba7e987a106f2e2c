"""What the fork server starts is what ``python SCRIPT`` starts."""

import json
import os
import signal
import subprocess
import sys

from tests.helpers.fork_server import Script, run_scripts

SCRIPT = """
import json, os, sys, torch
found = {"argv": sys.argv, "name": __name__, "path": sys.path[0], "stdin": sys.stdin.read(), "cwd": os.getcwd(),
         "environ": dict(os.environ), "left": hasattr(torch, "left_behind"), "file": __file__}
torch.left_behind = os.environ["LEFT_BEHIND"] = "x"
print(json.dumps(found))
print("some error", file=sys.stderr)
sys.exit(7)
"""


def test_a_script_finds_and_leaves_what_it_does_as_a_new_process(tmp_path, monkeypatch):
    file = tmp_path / "script"
    file.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    environ = {"PATH": os.environ["PATH"], "MINE": "1"}
    arguments = [str(file), "--an", "argument"]
    expected = subprocess.run([sys.executable, *arguments], env=environ, input="typed", capture_output=True, text=True)
    forked = run_scripts([Script(arguments, environ, "typed")] * 2) + run_scripts([Script(arguments, environ, "typed")])
    for done in (expected, *forked):
        assert (done.returncode, done.stderr.splitlines()[-1]) == (7, "some error")
        found = json.loads(done.stdout)
        found["environ"].pop("LC_CTYPE", None)  # Python's own, where there is no locale
        assert found == {"argv": arguments, "name": "__main__", "path": str(tmp_path), "stdin": "typed",
                         "cwd": str(tmp_path), "environ": environ, "left": False, "file": str(file)}


def test_exit_codes_are_those_of_processes(tmp_path):
    texts = {"fine": "", "raises": "1 / 0", "killed": "import os; os.kill(os.getpid(), 15)", "says": "exit('no')"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    done = run_scripts([Script([str(tmp_path / name)], dict(os.environ)) for name in texts])
    assert [one.returncode for one in done] == [0, 1, -signal.SIGTERM, 1]
    assert done[1].stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert [one.stderr for one in done if one is not done[1]] == ["", "", "no\n"]


def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    file = tmp_path / "hangs"
    file.write_text("import os, time; print(os.fork(), flush=True); time.sleep(600)")
    (done,) = run_scripts([Script([str(file)], dict(os.environ))], timeout_s=2)
    assert done.returncode == -signal.SIGKILL
    child = next(int(line) for line in done.stdout.splitlines() if line != "0")
    with open(f"/proc/{child}/stat") if os.path.exists(f"/proc/{child}") else open(os.devnull) as stat:
        assert stat.read().split()[2:3] in ([], ["Z"])
