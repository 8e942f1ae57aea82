# What swarmmail wants to know of a host, in one round trip. Reads only; two kernel tests add and remove
# a throw-away object (an ESP state for addresses that nobody has, a link). Sections begin with "@@name". Docker is
# asked meanwhile; what the other sections say waits in the pipe. Programs are started sparingly: nearly every task
# begins with this, and a slow host takes its time for each.
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
s() { printf '\n@@%s\n' "$1"; }
docker_says() {
# A manager without a leader answers after 20 s (moby, daemon/cluster: swarmRequestTimeout).
s docker;    info=$(command -v docker >/dev/null && timeout @ANSWER@ docker info --format '{{json .}}' 2>/dev/null); printf '%s\n' "$info"
s peers;     case $info in *'"LocalNodeState":"active"'*) timeout 5 docker network inspect ingress --format '{{json .Peers}}' 2>/dev/null ;; esac
}
host_says() {
s os;        cat /etc/os-release 2>/dev/null
set -- $(uname -nrm)  # in this order
s hostname;  echo "$1"
s kernel;    echo "$2"
s machine;   echo "$3"
s clock;     date +%s.%N
s uptime;    read -r up _ </proc/uptime && echo "$up"
s systemd;   [ -d /run/systemd/system ] && echo yes
s programs;  for p in docker dockerd wg wg-quick wireguard-go nft iptables rsync apt-get tcpdump; do command -v $p >/dev/null && echo $p; done
s resolvers; grep -s '^nameserver' /etc/resolv.conf
s tun;       [ -c /dev/net/tun ] && echo yes
s wireguard; if [ -d /sys/module/wireguard ] || modprobe -q wireguard 2>/dev/null || ip link add swarmmail-try type wireguard 2>/dev/null; then echo yes; ip link del swarmmail-try 2>/dev/null; fi
s esp
[ -d /sys/module/esp4 ] || modprobe -q esp4 2>/dev/null
if ip xfrm state add src 127.255.255.253 dst 127.255.255.254 proto esp spi 0x0d0c0001 mode transport \
      aead 'rfc4106(gcm(aes))' 0x0000000000000000000000000000000000000000 64 2>/dev/null; then
  echo yes; ip xfrm state del src 127.255.255.253 dst 127.255.255.254 proto esp spi 0x0d0c0001 2>/dev/null
fi
s units
units=$(systemctl show -p Id,ActiveState,UnitFileState,MainPID,ActiveEnterTimestampMonotonic docker swarmmail-guard wg-quick@swarmmail 2>/dev/null)
printf '%s\n' "$units"
# Docker opens its socket for ESP when it starts, or never (moby, libnetwork/ns: getSupportedNlFamilies). 6: NETLINK_XFRM.
s docker-esp
pid=${units#*MainPID=}; pid=${pid%%[!0-9]*}  # the first is Docker's
if [ "${pid:-0}" -gt 0 ]; then
  ls -l "/proc/$pid/fd" 2>/dev/null | awk '
    NR == FNR { if (sub(/.*socket:\[/, "") && sub(/\]$/, "")) mine[$0]; next }
    $2 == 6 && $NF in mine { found = 1 }
    END { print found ? "yes" : "no" }' - /proc/net/netlink
fi
# Together with the tunnel: one that is just starting is to be seen at one moment of it.
s addresses;   ip -j addr show 2>/dev/null
s routes;      ip -j -4 route show table all 2>/dev/null
s mesh-config; cat /etc/wireguard/swarmmail.conf 2>/dev/null
# A tunnel that is just starting has no key yet, and says "(none)".
s mesh-key;    key=$(wg show swarmmail public-key 2>/dev/null); case $key in "" | *none*) [ -s /etc/wireguard/swarmmail.key ] && wg pubkey </etc/wireguard/swarmmail.key 2>/dev/null ;; *) echo "$key" ;; esac
s mesh-peers;  wg show swarmmail latest-handshakes 2>/dev/null
s mesh-port;   wg show swarmmail listen-port 2>/dev/null
s files;       sha256sum /etc/swarmmail/guard /etc/systemd/system/swarmmail-guard.service /etc/systemd/system/docker.service.d/swarmmail.conf 2>/dev/null
s guard;       /etc/swarmmail/guard check 2>/dev/null && echo yes
s listening;   ss -Hltn 2>/dev/null
# Of which overlays has this host tasks, to which hosts do they send, and does Docker's own encryption take their packets?
# In this order: Docker tells the kernel of ESP with a host before it tells the overlay of that host.
s overlays
tasks=
for n in /var/run/docker/netns/1-*; do
  [ -e "$n" ] || continue
  tasks=yes
  link=$(nsenter --net="$n" sh -c 'ip -d -o link show type vxlan; bridge fdb show' 2>/dev/null)
  case $link in *" vxlan id "*) vni=${link#* vxlan id } ;; *) vni= ;; esac
  echo "${n##*/1-} ${vni%%[!0-9]*}" $(echo "$link" | sed -n 's/.* dst \([0-9a-f.:]*\) .*/\1/p' | sort -u)
done
s esp-rules;   [ -z "$tasks" ] || { iptables -w 2 -t mangle -S OUTPUT 2>/dev/null; iptables -w 2 -S INPUT 2>/dev/null; }
# Never the keys. A program or a kernel that can't tell says nothing, rather than "none".
s esp-peers
[ -z "$tasks" ] || { policies=$(ip xfrm policy list 2>/dev/null) && states=$(ip xfrm state list nokeys 2>/dev/null) &&
  { echo read; printf '%s\n' "$policies" "$states" | grep '^src '; }; }
s volumes
root=$(sed -n "s/.*\"data-root\": *\"\([^\"]*\)\".*/\1/p" /etc/docker/daemon.json 2>/dev/null)
for f in "${root:-/var/lib/docker}"/volumes/*/_data/.swarmmail-volume; do
  [ -f "$f" ] && [ ! -L "$f" ] || continue
  v=${f%/_data/*}; echo "volume=${v##*/}"
  # What is in a volume is the container's to write: no link is followed, no pipe waited for, no other line passed on.
  dd if="$f" iflag=nofollow,nonblock bs=4096 count=1 status=none 2>/dev/null |
    grep -aE '^(cluster|service|generation|node|state)='
done
s end
}
host_says | { docker_says; cat; }
