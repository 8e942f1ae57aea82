#!/bin/bash
# floor.sh FOLDER STEP...: the same Docker commands over multiplexed SSH, in parallel; nothing is checked, and nothing can be
# run twice. No tool can be much faster.
#   swarm    make the Swarm, label the nodes, create the overlay
#   settle   wait until all nodes hear each other by gossip: before that, names do not resolve
#   images   save the archives, load on each host the one meant for it (beside swarm: at the same time)
#   secrets  create the stack's secrets
#   stack    deploy the stack, wait until it runs
# FOLDER, written by bootstrap.py: settings (shell: ssh_config, network, stack, images); hosts (lines: name address role
# archive labels, - for none; the first host is the first manager); archives (lines: file image...); stack.json; secrets.
set -u
wait_script=$(cd "$(dirname "$0")" && pwd)/wait.sh
cd "$1" || exit 1
shift
steps=" $* "
. ./settings

wants() { [[ $steps == *" $1 "* ]]; }
on() { local name=$1; shift; ssh -F "$ssh_config" "${address[$name]}" "$@"; }
all() { local pid; for pid in "$@"; do wait "$pid" || { echo "FAILED: process $pid"; exit 1; }; done; }

declare -A address role archive labels
names=()
while read -r name at is file label; do
  names+=("$name"); address[$name]=$at; role[$name]=$is; archive[$name]=$file; labels[$name]=${label#-}
done <hosts
first=${names[0]}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pids=()
for name in "${names[@]}"; do on "$name" 'docker version -f {{.Server.Version}}' >"$work/version.$name" & pids+=($!); done
all "${pids[@]}"

copying=()
if wants images; then
  (
    echo "copy begins"
    pids=()
    while read -r file images; do docker save -o "$file" $images & pids+=($!); done <archives
    all "${pids[@]}"
    pids=()
    for name in "${names[@]}"; do
      [ "${archive[$name]}" = - ] || { on "$name" docker load -q <"${archive[$name]}" >/dev/null & pids+=($!); }
    done
    all "${pids[@]}"
    echo "copy ends"
  ) &
  copying=($!)
fi

if wants swarm; then
  tokens=($(on "$first" "docker swarm init --advertise-addr ${address[$first]} >/dev/null &&
    docker swarm join-token -q manager && docker swarm join-token -q worker")) || exit 1
  pids=()
  for name in "${names[@]}"; do
    if [ "$name" = "$first" ]; then
      on "$name" "docker info -f {{.Swarm.NodeID}}" >"$work/id.$name" &
    else
      token=${tokens[1]}
      [ "${role[$name]}" = manager ] && token=${tokens[0]}
      on "$name" "docker swarm join --advertise-addr ${address[$name]} --token $token ${address[$first]}:2377 >/dev/null &&
        docker info -f {{.Swarm.NodeID}}" >"$work/id.$name" &
    fi
    pids+=($!)
  done
  all "${pids[@]}"
  commands="docker network create -d overlay --attachable $network >/dev/null & p=\$!; "
  for name in "${names[@]}"; do
    words=
    for label in ${labels[$name]}; do words+=" --label-add $label"; done
    commands+="docker node update$words $(cat "$work/id.$name") >/dev/null & p=\"\$p \$!\"; "
  done
  on "$first" "$commands for q in \$p; do wait \$q || exit 1; done" || exit 1
fi

if wants settle; then
  pids=()
  for name in "${names[@]}"; do
    on "$name" "for i in \$(seq 300); do
      [ \"\$(docker network inspect ingress -f '{{len .Peers}}' 2>/dev/null)\" = ${#names[@]} ] && exit 0; sleep 0.05
    done; exit 1" & pids+=($!)
  done
  all "${pids[@]}"
fi

if wants secrets; then
  pids=()
  for secret in tls-certificate tls-key; do
    on "$first" "docker secret create $secret - >/dev/null" <"$secret" & pids+=($!)
  done
  all "${pids[@]}"
fi
[ ${#copying[@]} = 0 ] || all "${copying[@]}"

if wants stack; then
  on "$first" "docker stack deploy --detach=true --resolve-image never -c - $stack >/dev/null" <stack.json || exit 1
  on "$first" "sh -s -- $stack $images" <"$wait_script" || exit 1
fi
