#!/usr/bin/env bash
# pytest-xdist 3.8.0, coverage 7.17.5: tests that passed in a worker can be missing from the report, without a word.
#
# Guess before the run: coverage measures workers too (patch = subprocess) and each saves what it saw when it ends; who
# waits for the tests waits for that.
# Seen: coverage saves at the interpreter's exit. xdist gives a worker 10 seconds to end after its last test and then
# kills it. A worker that takes longer (a thread that goes on, a busy machine) loses all it measured: every test passes,
# the exit status is 0, nothing is printed, and the lines count as never run. Saved in pytest_sessionfinish, they are there.
# What to do: call coverage.Coverage.current().save() in pytest_sessionfinish of conftest.py.
# Versions: Python 3.11, pytest 9.2.0, pytest-xdist 3.8.0, coverage 7.17.5. Exit 0: as described; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pytest==9.2.0 pytest-xdist==3.8.0 coverage==7.17.5 execnet==2.1.2
cd "$folder"
echo 'def half(x): return x / 2' > measured.py
printf '[run]\nsource_pkgs = measured\nparallel = true\npatch = subprocess\n' > .coveragerc
cat > test_it.py <<'PY'
import threading
import time

import measured


def test_half():
    threading.Thread(target=time.sleep, args=(20,)).start()
    assert measured.half(3) == 1.5
PY
saving='
import sys
def pytest_sessionfinish():
    current = sys.modules["coverage"].Coverage.current()
    if current is not None:
        current.save()
'
trial() {
  rm -f .coverage*[0-9]* .coverage
  PATH="$folder/venv/bin:$PATH" coverage run -m pytest -q -n 1 -p no:cacheprovider test_it.py | tail -n 1
  PATH="$folder/venv/bin:$PATH" coverage combine --quiet > /dev/null 2>&1 || true
  { PATH="$folder/venv/bin:$PATH" coverage report --format=total 2> /dev/null || true; } | tail -n 1 > total
}
trial
echo "by itself: $(cat total) %"; grep -qx 100 total && exit 1
echo "$saving" > conftest.py
trial
echo "saved in pytest_sessionfinish: $(cat total) %"; grep -qx 100 total || exit 1
