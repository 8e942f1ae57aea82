-- A connection waits while its back end has no usable server: at most LIMIT seconds, then it is closed.
local LIMIT = 45
core.register_action("hold", { "tcp-req" }, function(txn, backend)
  local waited = 0
  while core.backends[backend]:get_srv_act() == 0 do
    if waited >= LIMIT * 1000 then
      core.log(core.warning, "the MDA has been away for " .. LIMIT .. " s: a client is sent away")
      return act.DENY
    end
    core.msleep(20)
    waited = waited + 20
  end
  return act.CONTINUE
end, 1)
