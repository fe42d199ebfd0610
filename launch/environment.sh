# Sourced by the other scripts: makes the virtual environment .venv with pinned dependencies, once.
# Usage: make_environment EXTRAS         for example "" or "[test]"; sets $PYTHON to the interpreter in it
#        use_environment EXTRAS          the environment that is active, if disttrain is in it; else .venv as above
#        install_system_packages NAME…   Debian's packages, where that can be done; else says why not

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in "${PYTHON_FOR_VENV:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    [ -n "$candidate" ] || continue
    "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
    printf '%s' "$candidate"
    return
  done
  die "Python 3.10 to 3.13 is needed and none was found; install python3, or set PYTHON_FOR_VENV=/path/to/python"
}

make_environment() {
  local extras=$1 base stamp
  [ "$(uname -s)" = Linux ] || die "Linux is needed, this is $(uname -s)"
  command -v c++ >/dev/null || die "a C++ compiler is needed; install one (Debian, Ubuntu: apt-get install g++)"
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    base=$(find_python) || exit 1
    say "making the virtual environment .venv with $("$base" --version)"
    "$base" -m venv .venv || die "$base cannot make virtual environments; install venv (Debian, Ubuntu: apt-get install python3-venv)"
  fi
  # What is installed is known by a checksum of what was asked for, so that a second run starts at once.
  stamp=$(cat pyproject.toml constraints.txt <(echo "$extras") | sha256sum | cut -c1-16)
  if [ ! -e ".venv/installed-$stamp" ]; then
    say "installing pinned dependencies (TensorFlow is some 600 MB; minutes at first)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".$extras" \
      || die "installing failed; the lines above say why"
    touch ".venv/installed-$stamp"
  fi
}

use_environment() {
  command -v disttrain >/dev/null && return
  make_environment "$1"
  export PATH=$PWD/.venv/bin:$PATH
}

install_system_packages() {
  local name missing=()
  if ! command -v apt-get >/dev/null; then
    say "there is no apt-get here: tests for which $* are missing will be skipped"
    return
  fi
  for name in "$@"; do
    dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    say "not root: ${missing[*]} cannot be installed, and tests that need them will be skipped"
    return
  fi
  say "installing ${missing[*]}"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >/dev/null \
    || die "installing failed; the lines above say why"
}
