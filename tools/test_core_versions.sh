#!/usr/bin/env bash
# The tests that run Megatron-Core, on earlier releases than the locked one. Each is installed in a folder of its own
# beside the locked environment and found first on PYTHONPATH; everything else stays as locked.
#   tools/test_core_versions.sh [--slow] [VERSION ...]      default: the versions below; --slow: the slow tests too
# Releases from 0.17 on say that they need Python 3.12; all but a data helper that is not used here runs on 3.11.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
selection=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  selection=()
  shift
fi
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.16.1 0.17.1 0.18.0) # 0.18.1 is withdrawn
# Of the distributed tests those without Megatron are left out; so are the engines', which know nothing of it.
tests=(tests/unit/device tests/unit/models tests/unit/checkpoint tests/distributed)
for name in fused_linear_heads reductions rollout_parallel spawn vocab_parallel; do
  tests+=("--ignore=tests/distributed/test_$name.py")
done

run() { # version; the output goes to the terminal
  local folder=.cores/$1
  if [ ! -d "$folder/megatron/core" ]; then
    rm -rf "$folder.partial"
    $bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
      --target "$folder.partial" "megatron-core==$1" || return 1
    rm -rf "$folder" && mv "$folder.partial" "$folder" || return 1
  fi
  PYTHONPATH=$PWD/$folder $bin/python -W ignore -c "
import megatron.core
assert '/$folder/' in megatron.core.__file__, megatron.core.__file__
" || return 1
  PYTHONPATH=$PWD/$folder $bin/pytest "${selection[@]}" "${tests[@]}"
}

failed=0
table=""
for version in "${versions[@]}"; do
  printf '\n\033[1mmegatron-core %s\033[0m\n' "$version"
  started=$SECONDS
  if run "$version"; then result=passed; else result=FAILED failed=1; fi
  table+=$(printf '%-10s %s  %4d s' "$version" "$result" $((SECONDS - started)))$'\n'
done
printf '\n\033[1m%-10s result\033[0m\n%s' "core" "$table"
exit $failed
