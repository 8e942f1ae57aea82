# start LIMIT FILTER OVERLAY PID...   what is in force on this host, then captures: of the underlay, and in each task's namespace
# stop DIRECTORY                      ends them, prints them, removes them
# Sections begin with "@@name". Captures end by themselves after LIMIT seconds; what a killed run left is removed by the next.
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
umask 077
s() { printf '\n@@%s\n' "$1"; }
start() {
  limit=$1 filter=$2 overlay=$3; shift 3
  for p in tcpdump python3 nsenter; do command -v $p >/dev/null || { echo "no $p" >&2; exit 69; }; done
  find /run -maxdepth 1 -name 'swarmmail-verify.*' -mmin +10 -exec rm -rf {} +
  d=$(mktemp -d /run/swarmmail-verify.XXXXXX) || exit 1
  # -Z root: the directory is root's alone
  set -- underlay "$@"
  for name; do
    enter=; [ "$name" = underlay ] || enter="nsenter -t $name -n"
    # In immediate mode the kernel gives each packet a slot of the snapshot length: few large ones, or packets are lost.
    if [ "$name" = underlay ]; then what=$filter; set_by="-s 65535 -B 32768"; else what=udp; set_by="-s 2048 -B 4096"; fi
    setsid timeout "$limit" $enter tcpdump -Z root -i any -y LINUX_SLL2 --immediate-mode -U -n $set_by -c 300000 \
      -w "$d/$name.pcap" "$what" >/dev/null 2>"$d/$name.log" </dev/null &
    echo $! >>"$d/pids"
  done
  s directory; echo "$d"
  s clock;     date +%s
  s links;     ip -j -d link show
  s tunnel;    ip -j addr show dev @LINK@ 2>/dev/null
  s key;       wg show @LINK@ public-key 2>/dev/null
  s port;      wg show @LINK@ listen-port 2>/dev/null
  s endpoints; wg show @LINK@ endpoints 2>/dev/null
  s allowed;   wg show @LINK@ allowed-ips 2>/dev/null
  s handshakes; wg show @LINK@ latest-handshakes 2>/dev/null
  s blackhole; ip -4 -j route show type blackhole 2>/dev/null
  s guard;     nft -s list table inet swarmmail 2>/dev/null
  s states;    ip xfrm state list nokeys 2>/dev/null
  s marks;     iptables -w 2 -t mangle -S OUTPUT 2>/dev/null
  s drops;     iptables -w 2 -t filter -S INPUT 2>/dev/null
  s forwarding; nsenter --net="/var/run/docker/netns/1-$overlay" bridge -j fdb show 2>/dev/null
  for name; do
    [ "$name" = underlay ] || { s "task $name"; nsenter -t "$name" -n ip -j addr show; }
  done
  s ready
  tries=0
  for name; do
    until grep -q 'listening on' "$d/$name.log"; do
      tries=$((tries + 1))
      [ $tries -lt 60 ] || { tail -1 "$d/$name.log"; exit 0; }
      sleep 0.05
    done
  done
  echo yes
}
stop() {
  d=$1
  case $d in /run/swarmmail-verify.*) ;; *) exit 64 ;; esac
  sleep 0.2  # what is under way
  kill -INT $(cat "$d/pids") 2>/dev/null
  tries=0
  while kill -0 $(cat "$d/pids") 2>/dev/null && [ $tries -lt 40 ]; do tries=$((tries + 1)); sleep 0.05; done
  for f in "$d"/*.pcap; do
    [ -e "$f" ] || continue
    name=${f##*/}; name=${name%.pcap}
    s "log $name"; tail -4 "$d/$name.log"
    s "capture $name"; gzip -1 <"$f" | base64
  done
  s end
  rm -rf "$d"
}
