#!/usr/bin/env bash
# voila 0.5.13: a page served on one's own machine asks a content delivery network for fonts whenever it is opened.
#
# Guess before the run: a dashboard served on 127.0.0.1 loads from there alone, all the more since voila ships Font
# Awesome among its own static files; a notebook that shows private pictures tells nobody that it is looked at.
# Seen: the default template ("lab") links two style sheets of Font Awesome at cdn.jsdelivr.net in every page, beside the
# files it ships; "classic" and "reveal" link others there. Offline the page works, since what it ships is enough. There
# is no option for it.
# What to do: a header Content-Security-Policy (Voila.tornado_settings, "headers") that allows 'self' alone: the browser
# then does not ask. Versions: Python 3.11, voila 0.5.13, ipykernel 7.0.1. Exit 0: as described; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$(cat "$folder/pid" 2> /dev/null)" 2> /dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet voila==0.5.13 ipykernel==7.0.1 2> /dev/null
cat > "$folder/page.ipynb" <<'NB'
{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "Hello"}],
 "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
 "nbformat": 4, "nbformat_minor": 5}
NB
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cd "$folder"
PATH="$folder/venv/bin:$PATH" voila page.ipynb --no-browser --port="$port" --Voila.ip=127.0.0.1 > "$folder/log" 2>&1 &
echo $! > "$folder/pid"
"$folder/venv/bin/python" - "$port" <<'PY' > "$folder/page.html"
import sys
import time
import urllib.request

for _ in range(240):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}", timeout=60) as page:
            print(page.read().decode())
        break
    except OSError:
        time.sleep(0.5)
PY
linked=$(grep -oE '<link[^>]*href="https://cdn\.jsdelivr\.net/[^"]*fontawesome[^"]*"' "$folder/page.html" | wc -l)
shipped=$(find "$folder/venv/share/jupyter/voila" -name '*.woff2' | wc -l)
echo "style sheets of Font Awesome linked elsewhere: $linked; fonts that voila ships: $shipped"
grep -q "Hello" "$folder/page.html" && [ "$linked" -eq 2 ] && [ "$shipped" -gt 0 ]
