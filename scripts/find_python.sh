#!/usr/bin/env bash
# Prints the path of a Python that this project's environment can be made from; where there is none,
# says what was tried and how to get one, and exits with 2. PYTHON=/path/to/python is tried alone;
# else an environment that exists (VENV) keeps its Python.
set -euo pipefail

# Prints the interpreter behind a virtual environment rather than the environment's own, which may
# be the very one that is about to be rebuilt.
probe='
import importlib.util, os, sys, sysconfig

version = ".".join(map(str, sys.version_info[:3]))
# torch 2.11 has wheels for CPython 3.10 to 3.14, megatron-core 0.19 needs 3.12.
if not (3, 12) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"is {version}, expected 3.12 to 3.14")
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(f"is {sys.version.split(chr(10))[0]}; torch has no wheels for it")
if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
    sys.exit(f"is {version} without venv and ensurepip (Debian, Ubuntu: apt install python3-venv)")
base = getattr(sys, "_base_executable", sys.executable)
print(base if os.path.exists(base) else sys.executable)
'

# All places on the PATH, not just the first: a pyenv shim may stand before a Python that works.
candidates() {
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s\n' "$PYTHON"
        return
    fi
    [[ ! -e ${VENV:-}/bin/python ]] || printf '%s\n' "$VENV/bin/python"
    local name
    for name in python3.12 python3.13 python3.14 python3; do
        type -aP "$name" || true
    done
    compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.1[2-9]*/bin/python" || true
}

tried=""
newline=$'\n'
while IFS= read -r candidate; do
    # A candidate is run, not just looked up: a shim exists for versions that pyenv refuses to start.
    if found=$("$candidate" -I -c "$probe" 2>&1); then
        printf '%s\n' "${found##*"$newline"}"
        exit 0
    fi
    tried+="  $candidate: ${found%%"$newline"*}$newline"
done < <(candidates)

# Builtins only in this script: it must speak on the barest PATH.
printf '%s\n' \
    "No usable Python: expected CPython 3.12, 3.13 or 3.14 with venv and ensurepip. Tried:" \
    "${tried:-  nothing: no python3 on the PATH, none that pyenv made$newline}" \
    "Any one of these brings one:" \
    "  apt install python3.12 python3.12-venv     (Ubuntu 24.04; on Debian 13 python3 python3-venv)" \
    "  pyenv install 3.12" \
    "  conda create -n dsv3 python=3.12 && conda activate dsv3" \
    "  uv python install 3.12" \
    "or name one: make PYTHON=/path/to/python3.12" >&2
exit 2
