#!/usr/bin/env bash
# torch 2.14.1: who kills a launcher may leave its workers training: torchrun's always, those of multiprocessing.spawn
# where the launcher was started with `&` in a script.
#
# Guess before the run: torch ties a worker's life to its launcher's (spawn asks the kernel for a signal at the parent's
# death), so after SIGKILL of the launcher, by a scheduler or for lack of memory, the GPUs are free and the job can be
# started again.
# Seen: torchrun's worker has another parent and goes on writing. The child of spawn is gone if the launcher was started
# in the foreground; if it was started with `&` by a script, it writes on too. The signal that spawn asks for is SIGINT;
# a shell without job control starts what runs in the background with SIGINT ignored, and Python then leaves it so.
# torchrun starts plain subprocesses in sessions of their own and asks for no signal.
# What to do: let a worker watch os.getppid() and end when it changes, or stop jobs as a whole (a container, a cgroup).
# Versions: Python 3.11, torch 2.14.1, Linux. Exit 0: as described; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'cat "$folder"/*/pid 2> /dev/null | xargs -r -n 1 kill -9 2> /dev/null || true; rm -rf "$folder"' EXIT
cat > "$folder/beat.py" <<'PY'
import os
import sys
import time
from pathlib import Path

from torch.multiprocessing import spawn


def beat(rank, folder):
    (Path(folder) / "pid").write_text(f"{os.getpid()}\n")
    for count in range(600):
        (Path(folder) / "beat").write_text(str(count))
        time.sleep(0.1)


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        beat(0, sys.argv[1])
    else:
        spawn(beat, args=(sys.argv[1],), nprocs=1)
PY
cat > "$folder/trial.py" <<'PY'
import signal
import subprocess
import sys
import time
from pathlib import Path

folder, background, *command = sys.argv[1:]
folder = Path(folder)
folder.mkdir()


def as_a_shell_starts_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN if background == "background" else signal.SIG_DFL)


parent = subprocess.Popen(
    [sys.executable, *command, str(folder)], preexec_fn=as_a_shell_starts_it, stderr=subprocess.DEVNULL
)
for _ in range(1200):
    if (folder / "beat").exists():
        break
    time.sleep(0.1)
time.sleep(1)
parent.kill()
parent.wait()
time.sleep(2)
before = (folder / "beat").read_text()
time.sleep(1)
print("writes on" if (folder / "beat").read_text() != before else "gone")
PY
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 2> /dev/null
torchrun="-m torch.distributed.run --standalone --nproc-per-node 1"
seen=""
for where in foreground background; do
  agent=$("$python" "$folder/trial.py" "$folder/agent-$where" "$where" $torchrun "$folder/beat.py")
  child=$("$python" "$folder/trial.py" "$folder/spawn-$where" "$where" "$folder/beat.py")
  echo "launcher killed, started in the $where: torchrun's worker $agent, spawn's child $child"
  seen="$seen$agent, $child; "
done
[ "$seen" = "writes on, gone; writes on, writes on; " ]
