#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0: `--dist loadgroup` spreads the tests of one group over all workers, silently.
#
# Guess before the run: tests with the mark xdist_group run in one worker, as the option's help says; if a release of
# pytest broke that, the plugin would fail at import or warn. Notebook tests (cells that need each other) and costly
# fixtures rely on it.
# Seen: 8 tests of one group ran in 2 workers, exit 0, no warning. The plugin tells the scheduler a test's group by
# writing the private attribute `_nodeid` of the item; pytest 9.2 has no such attribute (it is `_id`), so the write
# lands in the item's __dict__, and the scheduler sees a group for every test. pytest 8.4.2 keeps the group together.
# What to do: `--dist loadfile`, or pytest below the release that renamed it.
# Versions: Python 3.11, pytest 9.2.0 and 8.4.2, pytest-xdist 3.8.0. Exit 0: as described; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'PY'
import os
import time
from pathlib import Path

import pytest


@pytest.mark.xdist_group("together")
@pytest.mark.parametrize("number", range(8))
def test_one_of_a_group(number):
    time.sleep(0.2)
    (Path(__file__).parent / os.environ["PYTEST_XDIST_WORKER"]).touch()
PY
workers() { # PYTEST-VERSION: how many workers ran tests of the group
  python3 -m venv "$folder/venv-$1"
  "$folder/venv-$1/bin/python" -m pip install --quiet "pytest==$1" pytest-xdist==3.8.0 2> /dev/null
  rm -f "$folder"/gw*
  "$folder/venv-$1/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup "$folder/test_group.py" > "$folder/log-$1"
  find "$folder" -maxdepth 1 -name 'gw*' | wc -l
}
old=$(workers 8.4.2)
new=$(workers 9.2.0)
echo "workers that ran the one group: pytest 8.4.2: $old, pytest 9.2.0: $new"
[ "$old" = 1 ] && [ "$new" = 2 ]
