#!/bin/sh
# The fence: a service starts only on the volumes that are its own.
#
#   /bin/sh /swarmmail-fence COMMAND [ARGUMENT...]
#   /bin/sh /swarmmail-fence --health COMMAND [ARGUMENT...]
#
# It comes as a Swarm config and wraps the command that the image has anyway, so it guards images that know nothing of it. POSIX
# shell only, no program besides the shell: an image may have few.
#
# For each mount path in SWARMMAIL_VOLUMES (separated by colons) it reads PATH/.swarmmail-volume, lines of `key=value`:
#   cluster     must be $SWARMMAIL_CLUSTER
#   service     must be $SWARMMAIL_SERVICE
#   generation  a number, not below $SWARMMAIL_GENERATION: below it, the data has moved on without this copy
#   node        must be $SWARMMAIL_NODE, the Swarm's id of this node
#   state       must be `live`
# Then it becomes COMMAND. Otherwise it says one sentence on standard error, with what to do, and exits with 78 (EX_CONFIG of
# sysexits.h). So neither a mistake of a scheduler nor a returning node can bring an empty or an old mailbox to life.
#
# During a move it waits instead, and looks again 50 times a second (`sleep` is then needed): on the target while its marker says
# `standby`, on the source while it says `held`. `fab migrate` writes `live` on one of the two, never on both.
#
# With --health: a fence that waits is well, and is in the Swarm's DNS before it is needed. Otherwise COMMAND judges.
set -u


refuse() {
    echo "swarmmail: ${SWARMMAIL_SERVICE:-this service} does not start: $*" >&2
    exit 78
}

# At most 18 digits: what is longer is compared differently by different shells.
is_number() { case $1 in '' | *[!0-9]* | ???????????????????*) return 1 ;; esac; }

is_empty() {
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        if [ -e "$entry" ] || [ -L "$entry" ]; then return 1; fi
    done
}

check() {
    volume=$1 marker=$1/.swarmmail-volume
    [ -d "$volume" ] || refuse "nothing is mounted at $volume; correct the volumes of the stack file and deploy again."
    [ ! -L "$marker" ] || refuse "the marker $marker is a link, which swarmmail never makes; run 'fab status' before you touch the volume."
    if [ ! -e "$marker" ]; then
        if is_empty "$volume"; then
            refuse "the volume at $volume is empty, its data is somewhere else or lost; run 'fab status' to see where it is."
        fi
        refuse "the volume at $volume has files but no marker .swarmmail-volume, so nobody knows whose they are; run 'fab status'."
    fi
    [ -f "$marker" ] && [ -r "$marker" ] \
        || refuse "the marker $marker can't be read; make it a file that user $(id -u 2> /dev/null) may read."

    cluster='' service='' generation='' node='' state=''
    while IFS='=' read -r key value || [ -n "$key" ]; do
        case $key in
            cluster) cluster=$value ;;
            service) service=$value ;;
            generation) generation=$value ;;
            node) node=$value ;;
            state) state=$value ;;
        esac
    done < "$marker"

    [ "$cluster" = "$SWARMMAIL_CLUSTER" ] \
        || refuse "the volume at $volume belongs to cluster '$cluster', not to '$SWARMMAIL_CLUSTER'; keep it and give this cluster another."
    [ "$service" = "$SWARMMAIL_SERVICE" ] \
        || refuse "the volume at $volume belongs to service '$service'; correct the volumes of the stack file and deploy again."
    is_number "$generation" \
        || refuse "the marker $marker names no generation (found '$generation'); run 'fab status' before you touch the volume."
    [ "$generation" -ge "$SWARMMAIL_GENERATION" ] \
        || refuse "the volume at $volume is an old copy (generation $generation, wanted $SWARMMAIL_GENERATION); run 'fab status' to see where the data went."
    [ "$node" = "$SWARMMAIL_NODE" ] \
        || refuse "the volume at $volume was made for node '$node', this is '$SWARMMAIL_NODE'; move the service with 'fab migrate', not by hand."
    case $state in
        live) ;;
        standby | held) waiting=$state ;;
        *) refuse "the volume at $volume is marked '$state', not 'live'; run 'fab status' to see where the data went." ;;
    esac
}

swarmmail_health=no
if [ "${1:-}" = --health ]; then
    swarmmail_health=yes
    shift
fi
[ $# -gt 0 ] || refuse "the fence was given no command to run; deploy again."

# In a subshell, so that no variable of the command's environment is changed by a variable of ours.
judge() (
    [ -n "${SWARMMAIL_VOLUMES:-}" ] || exit 0
    [ -n "${SWARMMAIL_CLUSTER:-}" ] && [ -n "${SWARMMAIL_SERVICE:-}" ] && [ -n "${SWARMMAIL_NODE:-}" ] \
        && is_number "${SWARMMAIL_GENERATION:-}" \
        || refuse "the fence needs SWARMMAIL_CLUSTER, _SERVICE, _GENERATION (a number) and _NODE in the environment; deploy again."
    rest=$SWARMMAIL_VOLUMES: waiting=''
    while [ -n "$rest" ]; do
        volume=${rest%%:*} rest=${rest#*:}
        [ -z "$volume" ] || check "$volume"
    done
    [ -n "$waiting" ] || exit 0
    if [ -z "${1:-}" ] && [ "$swarmmail_health" = no ]; then
        echo "swarmmail: $SWARMMAIL_SERVICE waits: its volume is marked '$waiting', a move is under way (fab migrate.status)." >&2
    fi
    exit 75 # EX_TEMPFAIL
)

# Process 1 gets no signal that it does not ask for.
trap 'exit 143' TERM INT
judge
case $? in
    0) ;;
    75)
        if [ "$swarmmail_health" = yes ]; then exit 0; fi
        while :; do
            # a shell may have a `sleep` that knows whole seconds only
            sleep 0.02 2> /dev/null || sleep 1 || refuse "it has no program 'sleep', so it can't wait for a move; add one to the image."
            judge again
            case $? in 0) break ;; 75) ;; *) exit 78 ;; esac
        done
        ;;
    *) exit 78 ;;
esac
trap - TERM INT

exec "$@"
