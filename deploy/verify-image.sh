#!/usr/bin/env bash
# Build the image and serve a request from inside it, on a machine without a container engine.
#
#   deploy/verify-image.sh [--target cpu|cuda] [--keep] [WORK_FOLDER]
#
# - debootstrap makes the Debian root that stands for the base image (the official one is made the
#   same way), from this machine's own package mirror;
# - buildah executes the Dockerfile's steps (chroot isolation, so nothing but root is needed);
# - runc runs the result as the image says, and as an orchestrator would: its user, its entry
#   point, a read-only root, no capabilities, no new privileges, a network of its own
#   (deploy/image/container.py).
#
# pip's configuration of this machine, and the folders it names, are lent to the build by mounts and
# do not get into the image. Needs root, and buildah, debootstrap and runc (Debian packages of these
# names). Ends with 0 when everything held, and prints what it measured.
set -euo pipefail

target=cpu keep=
while [[ ${1:-} == --* ]]; do
    case $1 in
    --target) target=$2; shift 2 ;;
    --keep) keep=yes; shift ;;
    --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "unknown flag $1" >&2; exit 2 ;;
    esac
done
work=${1:-$(mktemp -d /var/tmp/vitrine-image.XXXXXX)}
source=$(cd "$(dirname "$0")/.." && pwd)
suite=bookworm

for tool in buildah debootstrap runc; do
    command -v $tool >/dev/null || { echo "$tool is not installed" >&2; exit 2; }
done
[[ $(id -u) == 0 ]] || { echo "root is needed: debootstrap and chroot" >&2; exit 2; }

mkdir -p "$work"
work=$(realpath "$work") # as /proc/mounts names it
say() { printf '%6ss  %s\n' "$SECONDS" "$*"; }
storage() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver overlay "$@"; }
finish() {
    storage umount --all >/dev/null 2>&1 || true
    # A build that failed leaves the layers of its steps mounted.
    awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | tac | xargs -r umount --lazy || true
    ! grep -qF " $work/" /proc/mounts || return 0 # nothing is removed through a mount
    [[ -n $keep ]] || rm -rf "$work"
}
trap finish EXIT

base=localhost/debian:$suite-slim
if ! storage inspect --type image "$base" >/dev/null 2>&1; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $suite" | head -1)
    [[ -n $mirror ]] || { echo "apt has no source for $suite here" >&2; exit 2; }
    say "debootstrap $suite"
    debootstrap --variant=minbase $suite "$work/root" "$mirror" >"$work/debootstrap.log"
    if [[ -e /etc/apt/sources.list.d/debian.sources ]]; then # with the security updates
        rm "$work/root/etc/apt/sources.list"
        cp /etc/apt/sources.list.d/debian.sources "$work/root/etc/apt/sources.list.d/"
    fi
    # What the official slim image leaves out, now and in what is installed on it.
    printf 'path-exclude /usr/share/%s/*\n' doc man info locale >"$work/root/etc/dpkg/dpkg.cfg.d/slim"
    rm -rf "$work"/root/usr/share/{doc,man,info,locale}/* "$work"/root/var/{cache,log}/* \
        "$work"/root/var/lib/apt/lists/*
    container=$(storage from scratch)
    storage add --quiet "$container" "$work/root" / >/dev/null
    storage config --cmd /bin/bash "$container"
    storage commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$work/root"
fi

# pip as it is set up here, in one file; for CUDA without its wheels, which are torch for CPUs.
pip_value() { python3 -m pip config list | sed -nE "s/^(global|:env:)\.$1='(.*)'$/\2/p" | tail -1; }
lent=(--volume "$work/pip.conf:/etc/pip.conf:ro")
echo "[global]" >"$work/pip.conf"
certificates=$(pip_value cert)
if [[ -n $certificates ]]; then # under another name: Debian's package writes to that one
    echo "cert = /lent/ca.crt" >>"$work/pip.conf"
    lent+=(--volume "$certificates:/lent/ca.crt:ro")
fi
for key in index-url extra-index-url find-links; do
    value=$(pip_value $key)
    [[ -n $value && $target-$key != cuda-find-links ]] || continue
    printf '%s = %b\n' $key "${value//\\n/\\n    }" >>"$work/pip.conf"
    for path in $(grep -oE '(file://|^| )/[^ ]+' <<<"${value//\\n/ }"); do
        path=${path#file://} path=${path%/simple}
        [[ ! -e $path ]] || lent+=(--volume "$path:$path:ro")
    done
done

say "building --target $target"
image=localhost/vitrine:$target
storage bud --format docker --isolation chroot --layers --build-arg BASE=$base --target "$target" "${lent[@]}" \
    --build-arg VERSION=verified --tag $image "$source" >"$work/build.log" 2>&1 ||
    { tail -30 "$work/build.log" >&2; exit 1; }
say "built; $(grep -c '^\[' "$work/build.log") steps, log in $work/build.log"

container=$(storage from --pull-never $image)
root=$(storage mount "$container")
storage inspect --type image $image >"$work/image.json"
say "size: $(du --summarize --block-size=1M "$root" | cut -f1) MiB, compressed" \
    "$(tar --create --directory "$root" . | gzip -1 | wc --bytes | numfmt --to=iec)"
du --block-size=1M --max-depth=1 "$root/opt" "$root/usr" | sort -n | tail -6 | sed "s,$root,    ,"

say "running it"
python3 "$source/deploy/image/container.py" "$root" "$work/image.json" --target "$target"
say "everything held"
