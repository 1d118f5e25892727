#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes files that their owner alone may read, whatever the umask is, and it writes over a
# symbolic link instead of through it.
#
# Guess before the run: a file of save_file has the mode of every new file (0644 under umask 022), as those beside it in
# a folder of weights; an existing file keeps its mode; written through a link, the file that it points to changes.
# Seen: 0600 in all cases, also over a file of mode 0664; the link is a file of its own afterwards and what it pointed to
# is as before. A colleague or a server under another user reads the config and the card of a checkpoint, and then finds
# no weights. Releases up to 0.7.0 do as guessed. Since 0.8.0 a private temporary file is renamed into place
# (https://github.com/safetensors/safetensors/issues/782 tells of the mode, not of links).
# What to do: chmod after writing, as dgs/atomic.py does; no links where weights are written.
# Versions: Python 3.11, safetensors 0.8.0 and 0.7.0, numpy 2.4.6, Linux. Exit 0: as described; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/modes.py" <<'PY'
import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
folder = Path(sys.argv[1])
new, shared, target, link = (folder / name for name in ("new", "shared", "target", "link"))
for path in (shared, target):
    save_file({"x": np.zeros(1)}, path)
shared.chmod(0o664)
link.symlink_to(target)
before = target.read_bytes()
for path in (new, shared, link):
    save_file({"x": np.ones(1)}, path)
modes = [f"{path.stat().st_mode & 0o777:o}" for path in (new, shared)]
print(*modes, "link" if link.is_symlink() else "file", "same" if target.read_bytes() == before else "written")
PY
found() { # SAFETENSORS-VERSION: mode of a new file, of one that was 664; what a link became, and its target
  python3 -m venv "$folder/venv-$1"
  "$folder/venv-$1/bin/python" -m pip install --quiet "safetensors==$1" numpy==2.4.6 2> /dev/null
  mkdir "$folder/$1"
  "$folder/venv-$1/bin/python" "$folder/modes.py" "$folder/$1"
}
old=$(found 0.7.0)
new=$(found 0.8.0)
echo "new file, file of mode 664, link, its target: 0.7.0: $old; 0.8.0: $new"
[ "$old" = "644 664 link written" ] && [ "$new" = "600 600 file same" ]
