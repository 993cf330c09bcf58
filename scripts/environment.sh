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
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Marks what .venv was made from; a copied or moved checkout gets a new one, as do changed locks.
fingerprint() { cat "$root/pyproject.toml" "$root/$1" && printf '%s' "$root"; }

prepare() {
    stamp="$venv/.gryphon-$1"
    if [ -f "$stamp" ] && fingerprint "$1" | cmp -s - "$stamp"; then
        return
    fi
    (
        # One installation at a time; the lock goes away with the process that holds it.
        if command -v flock >/dev/null 2>&1; then
            exec 9>"$root/.venv.lock"
            flock 9
            if [ -f "$stamp" ] && fingerprint "$1" | cmp -s - "$stamp"; then
                exit 0
            fi
        fi
        install "$1"
    ) || exit 1
}

install() {
    stamp="$venv/.gryphon-$1"
    if python=$(find_python); then
        say "first start: installing into .venv with $python (this takes a minute or two)"
        # --clear: what an interrupted or moved installation left is not worth trusting.
        if ! "$venv/bin/python" -c 'import sys' >/dev/null 2>&1 || [ ! -f "$venv/.root" ] ||
            [ "$(cat "$venv/.root")" != "$root" ]; then
            "$python" -m venv --clear "$venv" || fail_install
            printf '%s' "$root" >"$venv/.root"
        fi
        pip="$venv/bin/python -m pip"
        run_pip install --quiet --require-hashes -r "$root/$1" || fail_install
        run_pip install --quiet --no-deps --no-build-isolation -e "$root" || fail_install
    elif command -v uv >/dev/null 2>&1; then
        say "first start: installing into .venv with uv (this takes a minute or two)"
        uv venv --quiet --clear --seed --python '>=3.11' "$venv" || fail_install
        uv pip install --quiet --python "$venv/bin/python" --require-hashes -r "$root/$1" || fail_install
        uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e "$root" ||
            fail_install
        printf '%s' "$root" >"$venv/.root"
    else
        say "no Python 3.11 or newer (with venv) was found, nor uv."
        case $(uname -s) in
            Darwin) say "Install one: https://www.python.org/downloads/ or 'brew install python'." ;;
            *) say "Install one, for example 'sudo apt install python3 python3-venv', or uv." ;;
        esac
        exit 1
    fi
    fingerprint "$1" >"$stamp"
}

run_pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

fail_install() {
    say "the installation failed; the lines above say why. Is the package registry reachable?"
    exit 1
}
