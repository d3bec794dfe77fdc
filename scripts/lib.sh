# Shared by the scripts of this folder, which source it first: strict mode, the checkout as working directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "error: $*" >&2
  exit 1
}

# How many compilers may run at once: each needs up to 1.5 GB.
build_jobs() {
  local cores available_kb jobs
  cores=$(nproc)
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  jobs=$((available_kb / 1500000))
  ((jobs < 1)) && jobs=1
  ((jobs > cores)) && jobs=$cores
  echo "$jobs"
}

# build PRESET [TARGET...]: configures where needed and builds. Extra CMake arguments: DETOUR_CMAKE_ARGS.
build() {
  local preset=$1
  shift
  # shellcheck disable=SC2086
  cmake --preset "$preset" ${DETOUR_CMAKE_ARGS:-} >"/tmp/detour-cmake-$$" 2>&1 ||
    { cat "/tmp/detour-cmake-$$"; rm -f "/tmp/detour-cmake-$$"; return 1; }
  rm -f "/tmp/detour-cmake-$$"
  cmake --build "build/$preset" -j "$(build_jobs)" ${1:+--target "$@"}
}

# Our C++ files: all that git knows or would add, in the folders that hold code.
cxx_files() {
  git ls-files --cached --others --exclude-standard -- 'src/*.h' 'src/*.cc' 'tests/*.cc' 'bench/*.cc' 'bench/*.h' |
    while read -r file; do [[ -e $file ]] && echo "$file"; done
}
