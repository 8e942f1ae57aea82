# What only `fab check` wants to know of a host, in one round trip. Kernel abilities are tried in a throw-away network
# namespace: whatever ends this script, the kernel takes them away with it. Sections begin with "@@name".
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin XTABLES_LOCKFILE=/dev/null
s() { printf '\n@@%s\n' "$1"; }
# A line for each unit: name, active, enabled. One question for all of them: on a slow host each takes half a second.
units() { systemctl show -p Id,ActiveState,UnitFileState "$@" 2>/dev/null | awk -v RS= '
  { split("", now); for (i = 1; i <= NF; i++) { split($i, is, "="); now[is[1]] = is[2] }
    sub(/\.service$/, "", now["Id"]); print now["Id"], now["ActiveState"], now["UnitFileState"] }'; }
s machine-id; cat /etc/machine-id 2>/dev/null
s ssh-keys;   cat /etc/ssh/ssh_host_*_key.pub 2>/dev/null | cut -d' ' -f1,2
s container;  systemd-detect-virt --container 2>/dev/null
s time;       units systemd-timesyncd chrony chronyd ntp ntpd ntpsec openntpd | awk '$2 == "active" { print "daemon=" $1 }'
              [ -e /run/systemd/timesync/synchronized ] && echo synchronized=yes
s programs;   for p in python3 tcpdump nft ufw firewall-cmd unshare nsenter wg wireguard-go snap podman; do command -v $p; done
s python;     python3 -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
s docker-path; readlink -f "$(command -v docker)" 2>/dev/null
s version;    command -v docker >/dev/null && timeout 10 docker version -f '{{json .Server}}' 2>/dev/null
info=$(command -v docker >/dev/null && timeout 25 docker info -f '{{json .}}' 2>/dev/null)
s info;       printf '%s\n' "$info"
s daemon.json; [ -e /etc/docker/daemon.json ] && cat /etc/docker/daemon.json
s command;    pid=$(systemctl show docker -p MainPID --value 2>/dev/null); [ "${pid:-0}" -gt 0 ] && tr '\0' ' ' <"/proc/$pid/cmdline"
# The command line that the next start of Docker would have, and what dockerd itself says of it (since Engine 23.0).
next=$(systemctl show docker -p ExecStart --value 2>/dev/null | sed -n 's/.*argv\[\]=\([^;]*\) ;.*/\1/p')
opts=$([ -r /etc/default/docker ] && . /etc/default/docker >/dev/null 2>&1; printf '%s' "${DOCKER_OPTS:-}")
next=$(printf '%s' "$next" | sed 's/\$DOCKER_OPTS//'); next="$next $opts"
s next;       printf '%s\n' "$next"
s validate;   command -v dockerd >/dev/null && { set -- $next; shift; timeout 5 dockerd --validate "$@" 2>&1; echo "status=$?"; }
root=$(printf '%s' "$info" | sed -n 's/.*"DockerRootDir":"\([^"]*\)".*/\1/p')
: "${root:=$(sed -n 's/.*"data-root": *"\([^"]*\)".*/\1/p' /etc/docker/daemon.json 2>/dev/null)}"
root=${root:-/var/lib/docker}; [ -d "$root" ] || root=/var/lib
s disk;       df -B1 --output=avail,size,iavail,itotal,fstype,target "$root" 2>/dev/null | tail -n 1
s memory;     sed -n 's/^\(MemTotal\|MemAvailable\): *\([0-9]*\) kB/\1=\2/p' /proc/meminfo
s docker-nets; command -v docker >/dev/null && ids=$(timeout 5 docker network ls -q --filter driver=bridge 2>/dev/null) && [ -n "$ids" ] &&
              timeout 5 docker network inspect $ids -f '{{.Name}} {{range .IPAM.Config}}{{.Subnet}} {{end}}' 2>/dev/null
s links;      ip -j addr show 2>/dev/null
s route;      ip -j -4 route show 2>/dev/null
s sockets;    ss -Hltunp 2>/dev/null
s handshakes; wg show swarmmail latest-handshakes 2>/dev/null; echo "now $(date +%s)"
s units;      units docker docker.socket ufw firewalld nftables netfilter-persistent fail2ban unattended-upgrades
s ufw;        command -v ufw >/dev/null && timeout 5 ufw status 2>/dev/null | head -n 60
s nftables.conf; grep -n '^flush ruleset' /etc/nftables.conf 2>/dev/null
s firewalld;  command -v firewall-cmd >/dev/null && { timeout 5 firewall-cmd --version; sed -n 's/^FirewallBackend=//p' /etc/firewalld/firewalld.conf; timeout 5 firewall-cmd --direct --get-all-rules | wc -l; } 2>/dev/null
s nft;        nft -j list ruleset 2>/dev/null
# Only where the kernel has such tables already: to ask for one makes it.
s legacy;     for t in $(cat /proc/net/ip_tables_names 2>/dev/null); do iptables-legacy-save -t $t 2>/dev/null; done
s iptables;   iptables -V 2>/dev/null
s packages;   apt-cache policy docker.io docker-ce containerd containerd.io runc 2>/dev/null | sed -n '/^[a-z]/p; /Installed:/p; /Candidate:/p'
s held;       apt-mark showhold 2>/dev/null
s apt;        apt-config dump 2>/dev/null | grep -E '^(APT::Periodic::Unattended-Upgrade|Unattended-Upgrade::(Package-Blacklist|Allowed-Origins|Origins-Pattern))'
              dpkg-query -W -f 'unattended-upgrades=${db:Status-Status}\n' unattended-upgrades 2>/dev/null
              systemctl is-enabled apt-daily-upgrade.timer 2>/dev/null | sed 's/^/timer=/'
s ipvs;       [ -e /proc/net/ip_vs ] || modprobe -qn ip_vs 2>/dev/null && echo yes
s dmi;        cat /sys/class/dmi/id/sys_vendor 2>/dev/null
s kernel
modprobe -qa vxlan xt_policy xt_bpf xt_u32 2>/dev/null
if unshare -n true 2>/dev/null; then
  timeout 10 unshare -n sh -c '
    t() { name=$1; shift; if why=$("$@" 2>&1 >/dev/null); then echo "ok $name"; else echo "no $name: $(printf "%s" "$why" | head -n 1)"; fi; }
    ip link set lo up 2>/dev/null
    t vxlan ip link add v0 type vxlan id 1 dstport 4789 dev lo
    t bridge ip link add b0 type bridge
    t veth ip link add e0 type veth peer name e1
    t wireguard ip link add w0 type wireguard
    t esp ip xfrm state add src 127.255.255.253 dst 127.255.255.254 proto esp spi 0x0d0c0001 mode transport aead "rfc4106(gcm(aes))" 0x0000000000000000000000000000000000000000 64
    t policy iptables -w 3 -A INPUT -p udp --dport 4789 -m policy --dir in --pol none -j DROP
    t bpf iptables -w 3 -A INPUT -p udp --dport 4789 -m bpf --bytecode "1,6 0 0 1" -j DROP
    t u32 iptables -w 3 -A INPUT -p udp --dport 4789 -m u32 --u32 "0>>22&0x3C@12&0xFFFFFF00=0x00100100" -j DROP
    t mark iptables -w 3 -t mangle -A OUTPUT -p udp --dport 4789 -j MARK --set-mark 0xd0c4e3
    t nat iptables -w 3 -t nat -A POSTROUTING -j MASQUERADE
    t nft nft "add table inet swarmmail-try; add chain inet swarmmail-try in { type filter hook prerouting priority raw; policy accept; }; add rule inet swarmmail-try in iifname != \"lo\" udp dport 4789 counter drop"
    t tun ip tuntap add dev t0 mode tun
  '
else
  echo "no namespace: $(unshare -n true 2>&1 | head -n 1)"
fi
s end
