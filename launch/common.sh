# What the launchers share: the virtual environment. Sourced, never run. Needs bash 4 and a Python with pip, or uv.
# UV_CONSTRAINT=FILE pins versions (a line such as jax==0.10.2); with another file the environment is made to fit it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JSPEC_VENV:-$root/.venv}

say() { printf 'jspec: %s\n' "$*" >&2; }
die() { printf 'jspec: error: %s\n' "$*" >&2; exit 2; }

# A command may be on the path and still not run (a version manager's shim), so each candidate is tried.
python_is() { "$1" -c "import sys; sys.exit(not ($2))" >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    python_is "$candidate" 'sys.version_info >= (3, 11)' && { command -v "$candidate"; return; }
  done
  die "Python 3.11 or newer is needed and none of these is one: ${PYTHON:-python3 python3.13 python3.12 python3.11}." \
      "Install one, or name it: PYTHON=/path/to/python3.12 bash launch/..."
}

# Prints the path of a uv that runs: the machine's own, or one that pip puts beside the environment. --target keeps
# clear of system Pythons that refuse other installations (PEP 668), and any Python that has pip will do for it.
find_uv() {
  local tools=$root/.venv.tools candidate
  if uv --version >/dev/null 2>&1; then command -v uv; return; fi
  if ! "$tools/bin/uv" --version >/dev/null 2>&1; then
    for candidate in "$1" python3 python /usr/bin/python3 none; do
      [ "$candidate" != none ] || die "neither uv nor pip is here: install one of them (apt install python3-pip)"
      python_is "$candidate" '__import__("pip")' && break
    done
    say "fetching uv with pip"
    "$candidate" -m pip install --quiet --disable-pip-version-check --upgrade --target "$tools" uv >&2 \
      || die "pip could not install uv into $tools ($(room)); its message is above"
  fi
  echo "$tools/bin/uv"
}

# cpu, cuda, cuda12 (a driver too old for CUDA 13) or tpu. JSPEC_ACCELERATOR names one by hand.
find_accelerator() {
  local driver
  if [ -n "${JSPEC_ACCELERATOR:-}" ]; then echo "$JSPEC_ACCELERATOR"; return; fi
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then echo cpu; return; fi
  if [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
    if [[ $driver =~ ^[0-9]+$ ]] && [ "$driver" -lt 580 ]; then echo cuda12; else echo cuda; fi
    return
  fi
  if [ -n "${TPU_WORKER_HOSTNAMES:-}${TPU_ACCELERATOR_TYPE:-}" ] || [ -e /dev/accel0 ] || google_vfio; then
    echo tpu
  else
    echo cpu
  fi
}

# Newer TPUs are VFIO devices; a GPU or network card handed to a virtual machine is one too, so the vendor decides.
google_vfio() { compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; }

# prepare EXTRA,EXTRA... makes the environment with those extras; it does nothing, and writes nothing, when that is done.
prepare() {
  local stamp=$venv/.jspec-${1//,/-} want
  case ${1%%,*} in
    cpu|cuda|cuda12|tpu) ;;
    *) die "JSPEC_ACCELERATOR must be cpu, cuda, cuda12 or tpu, not '${1%%,*}'";;
  esac
  want=$({ cat "$root/pyproject.toml" ${UV_CONSTRAINT:-}; printf '%s\n' "$root $1"; } | cksum)
  if prepared "$stamp" "$want"; then return; fi
  mkdir -p "$(dirname "$venv")" 2>/dev/null || cannot_write "$(dirname "$venv")"
  if command -v flock >/dev/null; then   # launches at the same time wait for the first one's installation
    { : >>"$venv.lock"; } 2>/dev/null || cannot_write "$venv.lock"
    exec 9>>"$venv.lock"
    flock -n 9 || { say "waiting for another installation"; flock 9; }
  fi
  if ! prepared "$stamp" "$want"; then
    install "$1"
    { printf '%s\n' "$want" >"$stamp"; } 2>/dev/null || cannot_write "$stamp"
  fi
  if [ -e "$venv.lock" ]; then exec 9>&-; fi
}

prepared() { [ "$(cat "$1" 2>/dev/null)" = "$2" ] && python_is "$venv/bin/python" True; }

cannot_write() { die "$1 cannot be written to ($(room)); make room, or name another place: JSPEC_VENV=/path bash launch/..."; }

# How much is free where the environment goes: a full disk is the most common reason of all.
room() {
  local place=$venv
  until [ -d "$place" ]; do place=$(dirname "$place"); done
  df -Pm "$place" 2>/dev/null | awk -v place="$place" 'NR == 2 { print $4 " MB free in " place }'
}

install() {
  local uv python
  if python_is "$venv/bin/python" True; then
    python_is "$venv/bin/python" 'sys.version_info >= (3, 11)' || die "$venv has a Python older than 3.11: remove it"
    uv=$(find_uv "$venv/bin/python") || exit 2
  else
    python=$(find_python) || exit 2
    uv=$(find_uv "$python") || exit 2
    say "making $venv with $("$python" --version)"
    "$uv" venv --quiet --clear --python "$python" "$venv" || die "uv could not make $venv ($(room)); its message is above"
  fi
  say "installing jspec[$1] into $venv (once)"
  use_pip_settings
  UV_LINK_MODE=${UV_LINK_MODE:-copy} "$uv" pip install --quiet --python "$venv/bin/python" --editable "$root[$1]" \
    || die "the installation failed ($(room)); uv's message is above"
}

# uv does not read pip's settings, and a cluster's package mirror and its certificate are often only there.
use_pip_settings() {
  local index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$(pip_setting index-url)}}
  local certificate=${SSL_CERT_FILE:-$(pip_setting cert)}
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
  if [ -n "$certificate" ]; then export SSL_CERT_FILE=$certificate; fi
}

# Of pip's files and environment; the last line is what counts.
pip_setting() { python3 -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | tail -n 1; }
