#!/bin/sh
# Written by swarmmail bootstrap. Keeps three things in force on this host, whatever reloads its firewall:
#  - VXLAN (UDP @PORT@) comes and goes by the tunnel only. Docker's VXLAN socket listens on every link: without
#    this rule a stranger's forged packet reaches a container, and is answered.
#  - what a container publishes is reached by the published port only. Where forwarding was on before Docker came,
#    Docker (before 28) leaves all its ports open to neighbours who route to the container itself: LMTP among them.
#  - the tunnel's subnet leaves by the tunnel or not at all (a blackhole route below the tunnel's own).
# guard apply | check | watch
set -u
PATH=$PATH:/usr/sbin:/sbin
rules() {
  cat <<EOF
table inet swarmmail
delete table inet swarmmail
table inet swarmmail {
  chain in  { type filter hook prerouting priority raw; policy accept; iifname != "@LINK@" udp dport @PORT@ counter drop; }
  chain direct { type filter hook forward priority filter; policy accept;
    oifname "docker_gwbridge" ct status dnat accept
    oifname "docker_gwbridge" iifname != "docker_gwbridge" ct state new counter drop; }
  chain out { type filter hook output priority raw; policy accept; oifname != "@LINK@" udp dport @PORT@ counter drop; }
}
EOF
}
route_there() { [ -n "$(ip -4 route show type blackhole @SUBNET@ 2>/dev/null)" ]; }
rules_there() {
  now=$(nft -s list table inet swarmmail 2>/dev/null) || return 1
  [ "$(printf '%s\n' "$now" | grep -c -e 'fname != "@LINK@" udp dport @PORT@ .*drop' -e '"docker_gwbridge" ct s' \
    -e '"docker_gwbridge" iifname .*drop')" = 4 ]
}
check() { route_there && rules_there; }
apply() {
  route_there || ip -4 route replace blackhole @SUBNET@ metric 4294967295 || return 1
  rules_there || rules | nft -f - || return 1
}
# Check after every change of a route or of the rules. One line of `nft monitor` a transaction is enough: the one
# that ends it. Should a monitor end, or applying fail, the whole script ends, and systemd starts it again.
watch() {
  apply || exit 1
  {
    (ip -4 monitor route; kill $$) &
    (nft monitor; kill $$) &
    sleep 1; echo "what changed before the monitors ran"
    wait
  } | while read -r line; do
    case $line in "add "* | "delete "*) continue ;; esac
    check || apply || kill $$
  done
}
case "${1:-}" in
  check) check ;;
  apply) apply ;;
  watch) watch ;;
  *) echo "usage: guard apply | check | watch" >&2; exit 64 ;;
esac
