#!/bin/bash
# fetch.sh CACHE: puts into CACHE what a VM boots from: Debian's kernel, the modules that are loaded, and an initramfs
# that mounts this machine's / read-only under a tmpfs. Needs root the first time. Does nothing if it is all there.
set -euo pipefail
cache=$1
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

packages=(qemu-system-x86 busybox-static cpio kmod xz-utils iproute2 procps python3-minimal rdma-core ibverbs-providers
  libibverbs-dev librdmacm-dev pkg-config libclang-dev)
missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || missing+=("$p")
done
if [ ${#missing[@]} != 0 ]; then
  echo "vm: installing ${missing[*]}" >&2
  wait=(-o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
  apt-get -qq "${wait[@]}" update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends "${wait[@]}" \
    install "${missing[@]}" >"$cache/apt.log" 2>&1 || { tail -n 5 "$cache/apt.log" >&2; exit 1; }
fi
# The modules that are loaded, at boot and later.
boot=(9pnet_virtio 9p overlay virtio_console veth)
later=(crc32_generic libcrc32c rdma_rxe ib_uverbs rdma_ucm sch_netem smc smc_diag tcp_diag)
[ "$(cat "$cache/ready" 2>/dev/null)" != "${boot[*]} ${later[*]}" ] || exit 0

# Linux 6.11 is the first that opens SMC sockets by IPPROTO_SMC; bookworm has such a one among its backports.
. /etc/os-release
suite=$VERSION_CODENAME
[ "$suite" != bookworm ] || suite=bookworm-backports
# An apt of its own, which knows that suite only, from the mirror that this machine uses.
apt=$cache/apt
mkdir -p "$apt"/{lists/partial,archives/partial}
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
options=(-qq -o Acquire::Retries=3 -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt" -o "Dir::Etc::sourcelist=$apt/sources.list"
  -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root)
apt-get "${options[@]}" update >&2
image=$(apt-cache "${options[@]}" depends "linux-image-amd64/$suite" |
  awk '/Depends: linux-image-[0-9]/ { print $2; exit }')
echo "vm: fetching $image of $suite" >&2
rm -rf "$cache"/{pkg,root,initramfs}
mkdir -p "$cache"/{pkg,initramfs/mod}
(cd "$cache/pkg" && apt-get "${options[@]}" download "$image" >&2 && dpkg-deb -x ./*.deb . && rm ./*.deb)

# Unpacked: xz takes long under emulation.
[ -d "$cache/pkg/lib" ] || ln -s usr/lib "$cache/pkg/lib"
version=$(basename "$cache"/pkg/lib/modules/*)
depmod -b "$cache/pkg" "$version"
order() {
  for m; do modprobe -d "$cache/pkg" -S "$version" --show-depends "$m" 2>/dev/null || :; done |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}
to=$cache/root/lib/modules/$version
mkdir -p "$to/kernel"
for f in $(order "${boot[@]}" "${later[@]}"); do
  case $f in
    *.xz) xz -dc "$f" >"$to/kernel/$(basename "$f" .xz)" ;;
    *) cp "$f" "$to/kernel/" ;;
  esac
done
cp "$cache/pkg/lib/modules/$version"/modules.{builtin,builtin.modinfo,order} "$to/"
depmod -b "$cache/root" "$version"
n=10
for f in $(order "${boot[@]}"); do
  f=$(basename "$f" .xz)
  cp "$to/kernel/$f" "$cache/initramfs/mod/$((n++))-$f"
done
cp /bin/busybox "$cache/initramfs/"
cat >"$cache/initramfs/init" <<'INIT'
#!/busybox sh
b=/busybox
$b mkdir -p /proc /ro /rw /new
$b mount -t proc proc /proc
for m in /mod/*; do $b insmod $m; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /ro
$b mount -t tmpfs tmpfs /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /new
guest=$($b sed 's/.*guest=\([^ ]*\).*/\1/' /proc/cmdline)
$b umount /proc
exec $b switch_root /new /bin/bash "$guest"
INIT
chmod +x "$cache/initramfs/init"
(cd "$cache/initramfs" && find . | cpio --quiet -o -H newc) >"$cache/initrd"
cp "$cache"/pkg/boot/vmlinuz-* "$cache/vmlinuz"
rm -rf "$cache/pkg" "$cache/initramfs" "$apt"
echo "${boot[*]} ${later[*]}" >"$cache/ready"
