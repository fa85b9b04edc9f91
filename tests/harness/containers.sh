# For docs/GUIDES.md, in a virtual machine, from a block's folder: podman as docker, and two images that it knows, a server
# and a client that goes on for ever.
cat >/etc/containers/storage.conf <<'CONF'
[storage]
driver = "vfs"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
CONF
# The machine has no modules for a bridge: a network of its own is the loopback device.
cat >/etc/containers/containers.conf <<'CONF'
[containers]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
ln -s "$(command -v podman)" bin/docker
mkdir -p /opt/smc image/{proc,sys,dev,tmp,etc,run}
cp bin/libsmc.so /opt/smc/
for program in sh sleep redis-server redis-cli redis-benchmark; do
  file=$(command -v "$program")
  for part in "$file" $(ldd "$file" | grep -o '/[^ ]*'); do
    cp -L --parents "$part" image/
  done
done
for name in bin lib lib64; do
  [ -e "image/$name" ] || ln -s "usr/$name" "image/$name"
done
image() { tar -C image -c . | docker import --change "CMD $2" - "$1" >/dev/null; }
image app:1.0 '["redis-server", "--save", ""]'
image sidecar:1.0 '["sh", "-c", "until redis-cli ping; do sleep 1; done; exec redis-benchmark -t get -l -q"]'

