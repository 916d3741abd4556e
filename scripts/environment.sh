# Sourced by the other scripts: goes to the repository root and provides `ensure_environment`.
# VENV names the virtual environment (default .venv); PYTHON the interpreter that creates it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"

_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found; install one, or name it with PYTHON=/path/to/python" >&2
    return 1
}

# ensure_environment FILE: create $VENV if it is missing, install FILE into it unless that was done before, and use it.
# requirements-dev.txt contains requirements.txt, so its stamp counts for both.
ensure_environment() {
    local requirements="$1" interpreter stamp wanted
    if [ ! -x "$VENV/bin/python" ]; then
        interpreter="$(_find_python)"
        echo "creating $VENV with $("$interpreter" --version)"
        "$interpreter" -m venv "$VENV"
    fi
    stamp="$VENV/.installed-$requirements"
    wanted="$(cat requirements*.txt | cksum)"
    if ! grep -qsxF "$wanted" "$stamp" "$VENV/.installed-requirements-dev.txt"; then
        echo "installing $requirements into $VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        echo "$wanted" > "$stamp"
    fi
    PATH="$(cd "$VENV/bin" && pwd):$PATH"
    export PATH
}
