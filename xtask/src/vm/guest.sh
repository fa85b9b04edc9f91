# Process 1 of a VM: RDMA devices (Soft-RoCE) on two veth pairs, kernel SMC-R ready to use, and then the command.
# Its output goes to the first virtio port, its status to the second. `command.sh` beside this sets `cache` and `run`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for d in /dev/shm /run; do mount -t tmpfs tmpfs $d; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
ln -sfn /proc/self/fd /dev/fd

read -r line </proc/cmdline
guest=${line##*guest=} guest=${guest%% *}
here=${guest%/*}
for p in /sys/class/virtio-ports/*; do
  read -r name <"$p/name"
  printf -v "port_$name" /dev/%s "${p##*/}"
done
exec >"$port_out" 2>&1 </dev/null
finish() { echo "$1" >"$port_status"; sync; echo o >/proc/sysrq-trigger; sleep 60; }
trap 'finish 125' EXIT
set -e
. "$here/command.sh"
mkdir -p /lib/modules
mount --bind "$cache/root/lib/modules" /lib/modules
ulimit -l unlimited
hostname smc-vm
ip link set lo up

# Both ends are in one network namespace, as Soft-RoCE knows no other. Packets from one to the other must cross a
# pair of devices, so the table of local addresses is asked only about what arrives. The second pair is for second links:
# the first end has eth0 and eth2, the other eth1 and eth3.
ip link add eth0 mtu 9000 type veth peer name eth1 mtu 9000
ip link add eth2 mtu 9000 type veth peer name eth3 mtu 9000
for d in all eth0 eth1 eth2 eth3; do
  sysctl -qw net.ipv4.conf.$d.{accept_local=1,rp_filter=0,arp_ignore=1,arp_announce=2}
done
for i in 0 1 2 3; do ip rule add pref $((6 + i)) iif eth$i lookup local; done
ip rule add pref 12 from 10.77.0.2 to 10.77.0.1 lookup 2
ip rule add pref 13 from 0.0.0.0 to 10.77.0.2 lookup 1
ip rule add pref 14 from 10.77.0.1 to 10.77.0.2 lookup 1
ip rule add pref 15 from 10.77.0.4 to 10.77.0.3 lookup 4
ip rule add pref 16 from 10.77.0.3 to 10.77.0.4 lookup 3
ip rule add pref 20 lookup local
ip rule del pref 0
# Checksums that Soft-RoCE asks for by name; in newer kernels they are built in.
modprobe -qa crc32_generic libcrc32c || :
modprobe -a ib_uverbs rdma_ucm rdma_rxe
pnet=()
for i in 0 1 2 3; do
  ip addr add 10.77.0.$((1 + i))/24 dev eth$i
  ip link set eth$i up
  rdma link add rxe$i type rxe netdev eth$i
  pnet+=(eth$i=NET$((i % 2)) rxe$i=NET$((i % 2)))
done
ip route add 10.77.0.2 dev eth0 src 10.77.0.1 table 1
ip route add 10.77.0.1 dev eth1 src 10.77.0.2 table 2
ip route add 10.77.0.4 dev eth2 src 10.77.0.3 table 3
ip route add 10.77.0.3 dev eth3 src 10.77.0.4 table 4
modprobe -a smc smc_diag
python3 "$here/smc.py" SMC-VM "${pnet[@]}"

export SMC_TEST_RDMA='rxe0 10.77.0.1 rxe1 10.77.0.2'
set +e
run
finish $?
