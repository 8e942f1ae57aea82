# What a move does on a host: `sh -s -- VERB ARGUMENT...`, as root, this text on standard input.
# Everything that lives only as long as a move is in /run/swarmmail-move-ID: gone with a reboot, and then every verb that needs
# it refuses. So a command of a run that was given up can do nothing any more.
# Exit status: 0 done, 3 refused (one line on standard error says why), else the failing program's.
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
umask 077
say() { echo "$*" >&2; }
refuse() { say "$*"; exit 3; }
folder() { D=/run/swarmmail-move-$1; [ -d "$D" ] || refuse "this move was ended by somebody else, or the host was restarted"; }

# ---- volumes and markers ----

# measure PATH...: "bytes files free free-inodes" over all of them; a path that is not there counts as empty. A file of several
# names counts for each: so it is copied at first.
measure() {
    bytes=0 files=0 free= inodes=
    for path; do
        if [ -d "$path" ]; then
            bytes=$((bytes + $(du -lsB1 "$path" | cut -f1))) files=$((files + $(find "$path" | wc -l)))
        fi
        while [ ! -d "$path" ]; do path=${path%/*}; done
        free=$(df -B1 --output=avail "$path" | tail -1) inodes=$(df --output=iavail "$path" | tail -1)
    done
    echo "$bytes" "$files" "$free" "$(case $inodes in *[0-9]*) echo "$inodes" ;; *) echo 0 ;; esac)"
}

value() { sed -n "s/^$2=//p" "$1/.swarmmail-volume" 2>/dev/null; }

# what PATH CLUSTER SERVICE: whether a copy may be written into this volume: "empty", or its marker's "generation state"
what() {
    if [ ! -e "$1/.swarmmail-volume" ]; then
        [ -z "$(ls -A "$1" | head -1)" ] || refuse "volume at $1 holds files and has no marker: it may be somebody's data"
        echo empty
        return
    fi
    [ "$(value "$1" cluster)" = "$2" ] && [ "$(value "$1" service)" = "$3" ] ||
        refuse "volume at $1 belongs to service '$(value "$1" service)' of cluster '$(value "$1" cluster)'"
    echo "$(value "$1" generation) $(value "$1" state)"
}

# mark ID PATH TEXT EXPECTED: write a marker (TEXT, lines), whole or not at all; one that is there already is left. EXPECTED:
# states that may be there, with commas around each; `none` for no marker, `older` for a live one that data has left long ago.
# ID: only while this move is under way; - for always.
mark() {
    [ "$1" = - ] || folder "$1"
    cd "$2" || exit 1
    [ "$(cat .swarmmail-volume 2>/dev/null)" != "$3" ] || return 0
    state=$(value . state)
    wanted=$(echo "$3" | sed -n 's/^generation=//p')
    case $4 in
        *,"${state:-none}",*) ;;
        *,older,*) [ "$state" = live ] && [ "$(value . generation)" -lt $((wanted - 1)) ] || refuse "volume at $2 is marked '$state'" ;;
        *) refuse "volume at $2 is marked '$state', expected ${4#,}" ;;
    esac
    # a full disk must not leave an empty one in its place
    (umask 022; printf '%s\n' "$3" >.swarmmail-volume.new) && sync .swarmmail-volume.new ||
        { rm -f .swarmmail-volume.new; exit 1; }
    mv .swarmmail-volume.new .swarmmail-volume
    sync .
}

# ---- who writes ----

# writers NAME: every process on this host that can write to the volume, as the kernel sees it: it has it mounted read-write and
# is no fence that waits. A process whose container init is gone is gone too: the kernel ends the whole PID namespace first.
writers() {
    for file in $(grep -lE " [^ ]*/volumes/$1/_data [^ ]+ rw" /proc/[0-9]*/mountinfo 2>/dev/null); do
        pid=${file#/proc/} pid=${pid%/*}
        words=$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)
        case $words in
            "/bin/sh /swarmmail-fence "* | "sleep 0.02 " | "sleep 1 ") ;;
            "") ;; # it has just ended
            *) echo "$pid $words" ;;
        esac
    done
}

# in_flight PORT PID...: whether a connection to this port (hexadecimal) is established in the network of a process
in_flight() {
    port=$1; shift
    [ "$port" = - ] && return 1
    for pid; do
        grep -q ":$port [0-9A-F]*:[0-9A-F]* 01 " "/proc/$pid/net/tcp" "/proc/$pid/net/tcp6" 2>/dev/null && return 0
    done
    return 1
}

# stop ID PORT GRACE NAMES PID...: end the containers whose first processes are PID, and see that nobody can write any more.
# Killed only when no delivery is in flight.
stop() {
    folder "$1"; port=$2 grace=$3 names=$4; shift 4
    tries=0
    while in_flight "$port" "$@"; do
        tries=$((tries + 1))
        [ "$tries" -le 500 ] || refuse "a delivery has been in flight for 10 s"
        sleep 0.02
    done
    for pid; do kill -TERM "$pid" 2>/dev/null; done
    # cheap first: no program is started in this loop but `sleep`
    tries=0
    while [ "$tries" -lt $((grace * 50)) ]; do
        alive=
        for pid; do kill -0 "$pid" 2>/dev/null && alive=yes; done
        [ -n "$alive" ] || break
        tries=$((tries + 1))
        sleep 0.02
    done
    while left=$(for name in $names; do writers "$name"; done); [ -n "$left" ]; do
        tries=$((tries + 1))
        if [ "$tries" -eq $((grace * 50)) ]; then
            in_flight "$port" "$@" && refuse "it does not end, and a delivery is in flight"
            for pid; do kill -KILL "$pid" 2>/dev/null; done
        fi
        [ "$tries" -le $((grace * 50 + 250)) ] || refuse "process $(echo "$left" | head -1) still has the volume"
        sleep 0.02
    done
}

# started PID: wait until a fence has let its service go
started() {
    tries=0
    while words=$(tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null) && [ "$tries" -lt 500 ]; do
        case $words in *"/swarmmail-fence "*) ;; "") break ;; *) return 0 ;; esac
        tries=$((tries + 1))
        sleep 0.02
    done
    exit 1
}

# ---- the way of the copy ----

keys_file() {
    home=$(getent passwd "$1" | cut -d: -f6)
    file=$(sshd -T 2>/dev/null | sed -n 's/^authorizedkeysfile //p' | cut -d' ' -f1 | sed "s|%h|$home|; s|%u|$1|; s|%%|%|")
    case ${file:=.ssh/authorized_keys} in /*) echo "$file" ;; *) echo "$home/$file" ;; esac
}

# is_copy PID: whether a process belongs to a copy: its number may be another's by now
is_copy() { tr '\0' ' ' <"/proc/$1/cmdline" | grep -q '^rsync \|^sudo -n rsync \|^sh -s -- pass \|swarmmail-move'; } 2>/dev/null

# family PID...: they and all their descendants: rsync works with two processes, below sudo with three
family() {
    for one; do
        echo "$one"
        family $(cat "/proc/$one/task/$one/children" 2>/dev/null)
    done
}

# copies FOLDER: the processes of copies that are under way, on either side
copies() {
    for pid in $(cat "$1/pids" 2>/dev/null); do
        is_copy "$pid" && family "$pid"
    done
}

# end_copies FOLDER: end those, also one that is stopped
end_copies() {
    those=$(copies "$1") tries=0
    while left=$(for pid in $those; do is_copy "$pid" && echo "$pid"; done); [ -n "$left" ]; do
        if [ "$tries" -lt 100 ]; then signal=TERM; else signal=KILL; fi
        for pid in $left; do
            kill -$signal "$pid" 2>/dev/null
            kill -CONT "$pid" 2>/dev/null
        done
        [ "$tries" -lt 300 ] || refuse "process $pid of a copy does not end"
        tries=$((tries + 1))
        sleep 0.02
    done
}

# end ID: those of this move
end() { folder "$1"; end_copies "$D"; }

# close USER: whatever moves left on this host: keys, connections, copies under way
close() {
    keys=$(keys_file "$1") kept=
    if grep -qs ' swarmmail-move-' "$keys"; then
        # whole or not at all: who loses lines of this file, to a full disk or with the power, gets in no more
        { cp -p "$keys" "$keys.swarmmail-new" &&
            { grep -v ' swarmmail-move-' "$keys" >"$keys.swarmmail-new" || [ $? = 1 ]; } &&
            sync "$keys.swarmmail-new" && mv "$keys.swarmmail-new" "$keys"; } ||
            { rm -f "$keys.swarmmail-new"; kept=yes; }
    fi
    for dir in /run/swarmmail-move-*; do
        [ -d "$dir" ] || continue
        end_copies "$dir"
        [ -S "$dir/ssh" ] && ssh -F /dev/null -S "$dir/ssh" -O exit x 2>/dev/null
        rm -rf "$dir"
    done
    # without its folder the key opens nothing
    [ -z "$kept" ] || refuse "the key of a move can't be taken out of $keys"
}

# open_source ID: make the key, here, where it stays; its public half
open_source() {
    D=/run/swarmmail-move-$1
    mkdir "$D" || exit 1
    : >"$D/pids"
    ssh-keygen -q -t ed25519 -N '' -C "swarmmail-move-$1" -f "$D/key" && cat "$D/key.pub"
}

# open_target ID USER HOURS FROM KEY PATH...: let that key in, from those addresses, for so long, for one command: to receive a
# copy into one of the paths. Prints "port N" and the host keys.
open_target() {
    id=$1 user=$2 hours=$3 from=$4 key=$5; shift 5
    D=/run/swarmmail-move-$id
    mkdir "$D" && chmod 755 "$D" && : >"$D/pids" && chmod 666 "$D/pids" || exit 1
    root= && [ "$user" = root ] || root="sudo -n "
    cat >"$D/serve" <<END
# The only command of a move's key: rsync as the receiver, without any option that could do more, into the volume.
set -f
paths='$*'
no() { echo "swarmmail: this key may not do that" >&2; exit 3; }
set -- \$SSH_ORIGINAL_COMMAND
[ "\${1:-} \${2:-}" = "rsync --server" ] || no
for word; do last=\$word; done
case " \$paths " in *" \${last%/} "*) ;; *) no ;; esac
shift 2
words=
while [ \$# -gt 2 ]; do
    case \$1 in
        --numeric-ids | --delete | --delete-during | --no-r | --stats | --bwlimit=* | --info=* | --log-format=* | -e.*) ;;
        --partial-dir) [ "\$2" = .swarmmail-partial ] || no; words="\$words \$1"; shift ;;
        --*) no ;;
        -@-1 | -[a-zA-Z]*) ;; # -@: --modify-window
        *) no ;;
    esac
    words="\$words \$1"
    shift
done
[ "\${1:-}" = . ] || no
echo \$\$ >>$D/pids
exec ${root}rsync --server \$words . "\$last"
END
    chmod 755 "$D/serve"
    keys=$(keys_file "$user")
    mkdir -p "${keys%/*}"
    [ -e "$keys" ] || { : >"$keys"; chmod 600 "$keys"; chown "$user" "${keys%/*}" "$keys"; }
    [ -z "$(tail -c1 "$keys")" ] || echo >>"$keys"
    until=$(date -d "+$hours hours" +%Y%m%d%H%M)
    echo "restrict,from=\"$from\",expiry-time=\"$until\",command=\"/bin/sh $D/serve\" $key" >>"$keys"
    sshd -T 2>/dev/null | grep '^port '
    cat /etc/ssh/ssh_host_*_key.pub
}

# connect ID WHERE PORT KNOWN: one connection for all passes. KNOWN: lines of known_hosts.
connect() {
    folder "$1"
    printf '%s\n' "$4" >"$D/known_hosts"
    [ -S "$D/ssh" ] && ssh -F /dev/null -S "$D/ssh" -O exit x 2>/dev/null
    # both ends of it: a pipe that stays open would keep the caller waiting
    ssh -F /dev/null -i "$D/key" -p "$3" -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=yes \
        -o UserKnownHostsFile="$D/known_hosts" -o GlobalKnownHostsFile=/dev/null -o ConnectTimeout=10 \
        -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o Ciphers=^aes128-gcm@openssh.com -o Compression=no \
        -M -S "$D/ssh" -fN "$2" >"$D/log" 2>&1 </dev/null || { tail -1 "$D/log" >&2; exit 255; }
}

GONE='^rsync: \[sender\] .* No such file or directory (2)$'

# pass ID MODE SINCE LINKED WHERE BWLIMIT PATH=PATH-THERE...: copy what differs. Times are seconds of this host's clock, by the time
# that the kernel itself keeps (ctime). Prints "began SECONDS" and rsync's statistics; exit status as rsync's (24: files went away,
# nothing else). MODE:
#   live    all, while the service runs. Names of one file are copied as files of their own: with -H, rsync 3.5.0 waits for ever when
#           such a name vanishes meanwhile and there are more than a thousand files (a mail that an IMAP client copies, then marks,
#           has two names), and its --timeout does not end that.
#   links   while the service runs: make names of one file one again, where that file has not changed since SINCE. What it does is
#           saved in the last pass. It does not wait for names that vanish, since it does not recurse; it may fail (2).
#   last    what has changed since SINCE; a folder counts, with what is right in it, when a name in it came or went. And names of
#           one file if it has changed since LINKED. 0: all.
# --modify-window=-1: times count to the nanosecond; else a file that changed twice within a second and kept its size would be taken
# for unchanged.
pass() {
    folder "$1"; mode=$2 since=$3 linked=$4 where=$5 limit=$6 vanished=0; shift 6
    echo "began $(date +%s)"
    echo $$ >>"$D/pids" # for `progress`: find is at work before rsync
    for pair; do
        path=${pair%%=*} there=${pair#*=}
        which="--dirs --from0 --files-from=$D/changed" # with it, -a does not recurse
        case $mode,$since in
            live,*) which= ;;
            links,*)
                (cd "$path" && exec find . -ignore_readdir_race -type f -links +1 ! -newerct "@$since" -printf '%p\0') >"$D/changed" || return
                [ -s "$D/changed" ] || continue
                which="-H $which"
                ;;
            last,0) which="-H --filter=R_.swarmmail-partial/" ;; # rsync itself never removes it
            last,*)
                (cd "$path" && exec find . -newerct "@$since" -type d -printf '%p/\0' -o \
                    \( -newerct "@$since" -o -type f -links +1 -newerct "@$linked" \) -printf '%p\0') >"$D/changed" || return
                which="-H $which"
                ;;
        esac
        rsync -aAXS $which --modify-window=-1 --numeric-ids --delete --partial-dir=.swarmmail-partial --bwlimit="$limit" --stats \
            --info=progress2 --exclude=/.swarmmail-volume --exclude=/.swarmmail-volume.new \
            -e "ssh -F /dev/null -S $D/ssh -o BatchMode=yes -o ProxyCommand=false" "$path/" "$where:$there/" >"$D/progress" 2>"$D/errors" &
        echo $! >>"$D/pids"
        wait $!
        status=$?
        tr '\r' '\n' <"$D/progress" | grep '^Number of regular files transferred\|^Total transferred file size'
        # what goes away between two looks at it (its type, then its ACL; a folder before it is read) is no more than vanished;
        # rsync begins a line anew where it shows progress
        if [ "$status" = 23 ] && grep -q "$GONE" "$D/errors" && ! grep -qv "$GONE\|^file has vanished: \|^rsync error: \|^IO error \|^$" "$D/errors"; then
            status=24
        fi
        [ "$status" = 0 ] || { grep -v '^rsync error\|^$' "$D/errors" | head -3 >&2; tail -1 "$D/errors" >&2; }
        case $status in 0) ;; 24) vanished=24 ;; *) return "$status" ;; esac # the next volume counts, too
    done
    return "$vanished"
}

# addresses: this host's own, for the line that lets it in
addresses() { ip -o addr show scope global | sed 's/.* inet6\{0,1\} \([^ /]*\).*/\1/' | sort -u; }

# settle PATH...: all of it to the disk; without what a copy that was ended began, and never came back to
settle() {
    for path; do
        find "$path" -type d -name .swarmmail-partial -prune -exec rm -r {} +
        sync -f "$path"
    done
}

# progress ID: a number that stays the same while no process of a copy does anything here (neither works nor reads nor writes,
# proc_pid_stat(5), proc_pid_io(5)); on the source also rsync's last line
progress() {
    folder "$1"
    for pid in $(copies "$D"); do cat "/proc/$pid/stat" "/proc/$pid/io" 2>/dev/null; done | cksum
    tail -c 300 "$D/progress" 2>/dev/null | tr '\r' '\n' | grep % | tail -1
}

# ---- comparing ----

# manifest ID FLUSH SINCE FIRST STEP ALSO PATH...: for each path a line "entries hash hashed hash-of-contents". Contents: of what
# has changed since SINCE (epoch), of files named ALSO, and of every STEP-th entry from FIRST on, if it is a file; up to 16 MB each,
# as rsync itself compared the checksum of each file that it sent. One walk: the stat(2) of each entry is what takes time.
# FLUSH: yes on the side that will come to life: it must be on the disk.
manifest() {
    folder "$1"; flush=$2 since=$3 first=$4 step=$5 also=$6; shift 6
    for path; do
        cd "$path" || exit 1
        [ "$flush" != yes ] || sync -f . &
        find . -mindepth 1 ! -path ./.swarmmail-volume ! -path ./.swarmmail-volume.new \
            \( -type f -size -16384k \( -newermt "@$since" -o -name "$also" \) -fprint0 "$D/contents" , \
            \( -type d -printf 'd 0 %m %U %G %T@ 0 %p\0' -o -type f -printf 'f %s %m %U %G %T@ %n %p\0' \
            -o -printf '%y %l 0 %U %G 0 0 %p\0' \) \) | sort -z >"$D/manifest"
        {
            cat "$D/contents"
            sed -zn "$first~$step{/^f [0-9]\{1,7\} /{s/^\([^ ]* \)\{7\}//p}}" "$D/manifest"
        } | sort -zu >"$D/sample"
        echo "$(tr -dc '\0' <"$D/manifest" | wc -c)" "$(sha256sum <"$D/manifest" | cut -c1-64)" \
            "$(tr -dc '\0' <"$D/sample" | wc -c)" "$(xargs -0r sha256sum <"$D/sample" | sha256sum | cut -c1-64)"
        wait
    done
}

# listing ID: the last manifest, a line an entry, what is not printable escaped
listing() { folder "$1"; tr '\0' '\n' <"$D/manifest" | sed -n l0; }

"$@"
