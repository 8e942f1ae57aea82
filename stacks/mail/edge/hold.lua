-- A new connection waits while its back end has no usable server: at most LIMIT seconds, then it goes on and is closed.
local LIMIT = 45
core.register_action("hold", { "tcp-req" }, function(txn, backend)
  local waited = 0
  while core.backends[backend]:get_srv_act() == 0 and waited < LIMIT * 1000 do
    core.msleep(20)
    waited = waited + 20
  end
  if waited >= LIMIT * 1000 then
    core.log(core.warning, "the MDA has been away for " .. LIMIT .. " s: a client is sent away")
  end
end, 1)
