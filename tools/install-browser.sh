#!/bin/sh
# Installs a Chromium for the report's browser tests where none is found: Debian's package, else Playwright's own build.
# Run from the repository root: sh tools/install-browser.sh
set -eu

find_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" && return 0
    done
    for cache in "${PLAYWRIGHT_BROWSERS_PATH:-}" "${HOME:-}/.cache/ms-playwright"; do
        [ -n "$cache" ] && ls "$cache"/chromium-*/chrome-linux*/chrome 2>/dev/null && return 0
    done
    return 1
}

with_apt() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -eq 0 ]; then as_root=""; elif command -v sudo >/dev/null; then as_root="sudo"; else return 1; fi
    # -E is for sudo's proxy settings; as root there is nothing to keep.
    ${as_root:+$as_root -E} apt-get update -q || return 1
    ${as_root:+$as_root -E} env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core
}

with_playwright() {
    for python in .venv/bin/python python3 python; do
        command -v "$python" >/dev/null && "$python" -c "import playwright" 2>/dev/null && "$python" -m playwright install chromium && return 0
    done
    return 1
}

if found=$(find_browser); then
    echo "found: $found"
elif { with_apt || with_playwright; } && found=$(find_browser); then
    echo "installed: $found"
else
    echo "No Chromium could be installed. Install the package chromium (or google-chrome) by your system's own means, or run" >&2
    echo "'python -m playwright install chromium' where the network allows it, then run the tests again." >&2
    exit 1
fi
