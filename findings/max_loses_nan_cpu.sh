#!/usr/bin/env bash
# What:     On a CPU, JAX 0.10.2 and 0.12.0.1 lose NaN in jnp.max and jnp.min of a larger float32 array: with one NaN among
#           8,192 numbers both give what the others have, at each of 64 places, where NumPy's, which they stand for, give NaN.
#           Below 4,096 numbers it is kept, jnp.sum and jnp.isfinite see it in any, and JAX 0.9.2 keeps it everywhere.
# Matters:  A check of weights, gradients or gaps of log-probabilities by their largest absolute value calls them sound:
#           a policy with one NaN weight was loaded, and answered with token 0.
# Instead:  Ask jnp.isnan(x).any() as well (jspec.drafts.base.maximum does).
# Output:   jax 0.9.2: NaN kept by max, min, sum of 768 numbers at 64, 64, 64 of 64 places, of 8192 at 64, 64, 64
#           jax 0.10.2: NaN kept by max, min, sum of 768 numbers at 64, 64, 64 of 64 places, of 8192 at 0, 0, 64
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11 or newer, pip, 1 GB in a temporary folder. About two minutes. (0.12.0.1 was looked at by hand.)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys
import jax
import jax.numpy as jnp
import numpy as np

expected = [int(x) for x in sys.argv[1].split(",")]
found = []
for size in (768, 8192):
    for reduce in (jnp.max, jnp.min, jnp.sum):
        kept = 0
        for place in np.linspace(0, size - 1, 64).astype(int):
            numbers = np.ones(size, np.float32)
            numbers[place] = np.nan
            assert np.isnan(numbers.max()) and np.isnan(numbers.min())
            kept += bool(jnp.isnan(reduce(jnp.asarray(numbers))))
        found.append(kept)
said = [", ".join(map(str, part)) for part in (found[:3], found[3:])]
print(f"jax {jax.__version__}: NaN kept by max, min, sum of 768 numbers at {said[0]} of 64 places, of 8192 at {said[1]}")
sys.exit(found != expected)
PYTHON
changed=
for pair in 0.9.2:64,64,64,64,64,64 0.10.2:64,64,64,0,0,64; do
  version=${pair%%:*}
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "jax==$version" "jaxlib==$version" 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
  JAX_PLATFORMS=cpu "$work/$version/bin/python" "$work/look.py" "${pair#*:}" || changed=yes
done
[ -z "$changed" ] && echo "as found" || { echo "this has changed"; exit 1; }
