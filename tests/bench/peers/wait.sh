#!/bin/sh
# wait.sh STACK IMAGE...: until a task runs of each image (with a health check: until it is healthy). Used by both peers.
stack=$1
shift
for _ in $(seq 600); do
  seen=$(docker stack ps "$stack" --no-trunc --filter desired-state=running --format '{{.Image}} {{.CurrentState}}')
  ready=yes
  for image in "$@"; do printf '%s\n' "$seen" | grep -q "^$image Running" || ready=; done
  [ -n "$ready" ] && exit 0
  sleep 0.2
done
docker stack ps "$stack"
exit 1
