#!/usr/bin/env bash
# Everything that wants a GPU, in one go of at most 12 minutes:
#
#     benchmarks/gpu_session.sh [--out FOLDER] [MODEL.onnx ...]
#
# The tests marked gpu, the kernels beside torchvision's, RoIAlign's bodies beside the CPU, copies and preprocessing;
# with models (exported, best with a canvas) also an engine of each where a TensorRT is installed, and a benchmark of
# all that can run it here. Rows go to results/*.csv as ever; a copy of them, the log of each step and a short
# report.md go to FOLDER (gpu_session). What did not run says so, with its reason. $PYTHON is the interpreter
# (.venv/bin/python, else python3); $SECONDS_AT_MOST shortens the 12 minutes.
#
# Exit code 0 when no step failed, 1 when one did or was cut off, 2 without a GPU.
set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
limit=${SECONDS_AT_MOST:-720}
out=gpu_session
models=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    -*) echo "gpu_session.sh: no such option: $1; it takes --out FOLDER and models" >&2; exit 2 ;;
    *)
      [ -f "$1" ] || { echo "gpu_session.sh: $1: no such file; expected a model.onnx" >&2; exit 2; }
      models+=("$(realpath "$1")"); shift ;;
  esac
done

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>/dev/null)
if [ -z "$gpu" ]; then
  echo "gpu_session.sh: no NVIDIA GPU here (nvidia-smi shows none), so nothing was run" >&2
  exit 2
fi

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
report=$out/report.md
cd "$root" || exit 2
failed=0
rows_before=$(mktemp -d)
trap 'rm -rf "$rows_before"' EXIT
cp benchmarks/results/*.csv "$rows_before"

# step NAME SECONDS COMMAND...: runs it, logs it, and writes its line of the report: how it ended, and its last words.
step() {
  local name=$1 most=$2 left=$((limit - SECONDS)) started=$SECONDS code=0 verdict last=""
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -le 5 ]; then
    verdict="not run: no time left"
    failed=1
  else
    echo "== $name (at most $most s)"
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    last=$(grep '[[:alnum:]]' "$out/$name.log" | tail -n 1 | tr '|' '/' | cut -c1-300)
    case $code in
      0) verdict=passed ;;
      2)  # what our commands answer then, and to errors; pytest does when it is interrupted
        verdict="could not run here"
        [[ $name == build-* ]] && ! grep -q "not installed" "$out/$name.log" && code=1 verdict="failed" ;;
      124 | 137) verdict="cut off after $most s" ;;
      *) verdict="failed with exit code $code" ;;
    esac
    [[ $code -eq 0 && $last == *skipped* && $last != *passed* ]] && verdict="nothing ran"
    [[ $code -eq 0 || $code -eq 2 ]] || failed=1
  fi
  echo "| $name | $verdict | $((SECONDS - started)) | $last |" >>"$report"
}

{
  echo "# A session on a GPU"
  echo
  echo "$gpu; $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  echo
  echo "| step | how it ended | seconds | its last line |"
  echo "|---|---|---|---|"
} >"$report"

step versions 60 "$PYTHON" - <<'PYTHON_CODE'
import importlib.metadata as metadata
import sys

found = [f"python {sys.version.split()[0]}"]
for name in (
    "torch torchvision onnx onnxruntime onnxruntime-gpu cuda-bindings tensorrt tensorrt-cu13 tensorrt-rtx-cu13 pycuda"
).split():
    try:
        found.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        found.append(f"no {name}")
print("; ".join(found))
import anchorline.runtime  # what is missing for everything says so here
PYTHON_CODE
step doctor 60 "$PYTHON" -m anchorline doctor
# The kernels first, alone and through the plugin library; then the CUDA layer; engines last, which take longest.
step kernels 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rs tests/engine/kernels
step cuda 120 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rs tests/runtime/tensorrt
step nms 60 "$PYTHON" benchmarks/nms_kernel.py
step frames 60 "$PYTHON" benchmarks/gpu_frames.py
step roi_align 150 "$PYTHON" benchmarks/roi_align_bodies.py
step engines 240 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rs tests/engine/builder
for model in ${models[@]+"${models[@]}"}; do
  name=$(basename "$model" .onnx)
  for flavour in tensorrt tensorrt-rtx; do
    # Compared with the ONNX file before it has its name.
    step "build-$name-$flavour" 150 "$PYTHON" -m anchorline build "$model" --for $flavour \
      --out "$out/$name-$flavour.engine"
  done
  step "bench-$name" 120 "$PYTHON" -m anchorline bench "$model" --batches 50 --csv "$out/bench-$name.csv"
  for engine in "$out/$name"-*.engine; do
    [ -f "$engine" ] && step "bench-$(basename "$engine" .engine)" 60 \
      "$PYTHON" -m anchorline bench "$engine" --batches 200 --csv "$out/bench-$(basename "$engine").csv"
  done
done

for file in benchmarks/results/*.csv; do
  cmp -s "$file" "$rows_before/$(basename "$file")" || cp "$file" "$out"
done
{
  echo
  echo "A test that skipped did not run: its reason is in the log. New rows: $(cd "$out" && echo *.csv | sed 's/\*.csv/none/')."
} >>"$report"
echo
cat "$report"
exit $failed
