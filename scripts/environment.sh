# Sourced by scripts/gryphon and scripts/test: finds a Python, makes .venv once, installs what the
# lock file names. Needs nothing but that Python (or uv) and the package registry.
#
#   prepare LOCK   make $root/.venv hold what $root/LOCK names, and this checkout itself
#
# POSIX sh; quotes everywhere, because the checkout's path may contain spaces.

venv="$root/.venv"

say() { printf 'gryphon: %s\n' "$*" >&2; }

find_python() {
    for candidate in "${GRYPHON_PYTHON:-}" python3.13 python3.12 python3.11 python3.14 python3 python; do
        [ -n "$candidate" ] || continue
        # Not -c alone: a venv.py where the user stands must not take the module's place.
        if "$candidate" -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Marks what .venv was made from; a copied or moved checkout gets a new one, as do changed locks.
fingerprint() { cat "$root/pyproject.toml" "$root/$1" && printf '%s' "$root"; }

is_prepared() {
    [ -x "$venv/bin/gryphon" ] && [ -f "$venv/.gryphon-$1" ] &&
        "$venv/bin/python" -I -S -c '' 2>/dev/null &&
        fingerprint "$1" | cmp -s - "$venv/.gryphon-$1"
}

prepare() {
    if is_prepared "$1"; then
        return
    fi
    if [ ! -w "$root" ]; then
        say "this is not set up yet, and $root cannot be written to set it up. Use a copy of it."
        exit 1
    fi
    if python=$(find_python); then
        # One installation at a time: the lock lives as long as descriptor 9 does.
        exec 9>"$root/.venv.lock"
        "$python" -I -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
        is_prepared "$1" || install_with_pip "$1"
        exec 9>&-
    elif command -v uv >/dev/null 2>&1; then
        install_with_uv "$1"
    else
        say "no Python 3.11 or newer (with venv) was found, nor uv."
        case $(uname -s) in
            Darwin) say "Install one: https://www.python.org/downloads/ or 'brew install python'." ;;
            *) say "Install one, for example 'sudo apt install python3 python3-venv', or uv." ;;
        esac
        exit 1
    fi
    fingerprint "$1" >"$venv/.gryphon-$1"
}

# An environment that runs and belongs to this path is added to; any other is made anew.
is_usable() {
    "$venv/bin/python" -I -S -c '' 2>/dev/null &&
        { [ ! -f "$venv/.root" ] || [ "$(cat "$venv/.root")" = "$root" ]; }
}

install_with_pip() {
    say "setting up .venv with $python (this takes a minute or two)"
    is_usable || "$python" -I -m venv --clear "$venv" || fail_install
    "$venv/bin/python" -I -c 'import pip' 2>/dev/null ||
        "$venv/bin/python" -I -m ensurepip >/dev/null || fail_install
    printf '%s' "$root" >"$venv/.root"
    run_pip install --quiet --require-hashes -r "$root/$1" || fail_install
    run_pip install --quiet --no-deps --no-build-isolation -e "$root" || fail_install
}

install_with_uv() {
    say "setting up .venv with uv (this takes a minute or two)"
    is_usable || uv venv --quiet --clear --seed --python '>=3.11' "$venv" || fail_install
    printf '%s' "$root" >"$venv/.root"
    run_uv --require-hashes -r "$root/$1" || fail_install
    run_uv --no-deps --no-build-isolation -e "$root" || fail_install
}

run_pip() { "$venv/bin/python" -I -m pip --disable-pip-version-check "$@"; }

run_uv() { uv pip install --quiet --python "$venv/bin/python" "$@"; }

fail_install() {
    say "the set-up failed; the lines above say why. Is the package index reachable?"
    exit 1
}
